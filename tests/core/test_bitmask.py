import numpy as np
import pytest

from pluribus.core.bitmask import BitMask, histogram, packed_size
from pluribus.core.errors import MismatchError


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 17, 1001])
def test_round_trip_on_odd_sizes(size):
    flags = np.random.default_rng(size).random(size) < 0.4
    mask = BitMask.of(flags)
    assert mask.packed.size == packed_size(size) == (size + 7) // 8
    assert np.array_equal(mask.flags(), flags)
    assert mask.count() == flags.sum()
    assert np.array_equal((~mask).flags(), ~flags)
    assert (~mask).count() == size - mask.count()  # spare bits stay 0
    for start, stop in ((0, size), (size // 3, size), (size // 3, size // 2), (size, size)):
        assert np.array_equal(mask.flags(start, stop), flags[start:stop])


def test_algebra_and_histogram():
    a, b, c = (np.array(bits, bool) for bits in ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0]))
    one, two, three = BitMask.of(a), BitMask.of(b), BitMask.of(c)
    assert np.array_equal((one & two).flags(), a & b)
    assert np.array_equal((one | two).flags(), a | b)
    assert np.array_equal((one ^ two).flags(), a ^ b)
    assert one == BitMask.of(a)
    assert one != two
    assert one.share == 0.6
    assert histogram([one, two, three]).tolist() == [1, 2, 1, 1]


def test_sizes_must_fit():
    with pytest.raises(MismatchError, match="9 bits need 2 bytes"):
        BitMask(np.zeros(1, np.uint8), 9)
    with pytest.raises(MismatchError, match="8 and 9 bits"):
        BitMask.of(np.ones(8)) & BitMask.of(np.ones(9))

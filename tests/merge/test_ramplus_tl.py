import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.ram import Ram
from pluribus.merge.ramplus_tl import RamPlusTl

from .conftest import merged

BASE = [0.0] * 6
A = [1, 1, 1, 1, 2, 0]  # shares element 4 with B, has four alone: rho = 1/4
B = [0, 0, 0, 0, 4, 8]  # one shared, one alone: rho = 1


def test_worked_by_hand():
    out = merged(RamPlusTl(r=0.5, alpha=0.5), BASE, A, B)
    gain_a, gain_b = 1 + 0.5 * 0.25, 1 + 0.5 * 0.5  # B's ratio is cut at alpha
    np.testing.assert_allclose(out, [gain_a] * 4 + [3, 8 * gain_b], rtol=1e-6)


def test_nothing_alone_means_the_largest_ratio_and_no_effect():
    out = merged(RamPlusTl(), [0.0, 0.0], [1, 2], [3, 4])
    np.testing.assert_array_equal(out, np.array([2, 3], np.float32))


def test_no_gain_is_ram():
    np.testing.assert_array_equal(merged(RamPlusTl(r=0), BASE, A, B), merged(Ram(), BASE, A, B))
    np.testing.assert_array_equal(merged(RamPlusTl(alpha=0), BASE, A, B), merged(Ram(), BASE, A, B))


@pytest.mark.parametrize("name", ["r", "alpha", "epsilon"])
def test_bad_parameters(name):
    with pytest.raises(InputError, match=f"ramplus_tl: {name} = -1"):
        RamPlusTl(**{name: -1})

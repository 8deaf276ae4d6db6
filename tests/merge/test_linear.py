import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.linear import Linear

from .conftest import merged


def test_worked_by_hand():
    out = merged(Linear(weight=(1.0, 3.0)), None, [1, 0, -2], [5, 4, 2])
    np.testing.assert_array_equal(out, np.array([4, 3, 1], np.float32))


def test_without_a_divisor():
    out = merged(Linear(weight=(1.0, 3.0), normalize=False), None, [1, 0], [5, 4])
    np.testing.assert_array_equal(out, np.array([16, 12], np.float32))


def test_the_base_is_no_input():
    out = merged(Linear(), [100.0], [1.0], [2.0])
    np.testing.assert_array_equal(out, np.array([1.5], np.float32))


def test_one_expert_is_returned_bit_for_bit():
    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    np.testing.assert_array_equal(merged(Linear(), None, x), x)


def test_weights_that_cancel():
    with pytest.raises(InputError, match="sum to zero; set normalize: false"):
        merged(Linear(weight=(1.0, -1.0)), None, [1.0], [2.0])
    out = merged(Linear(weight=(1.0, -1.0), normalize=False), None, [1.0], [2.0])
    assert out == -1


def test_wrong_number_of_weights():
    with pytest.raises(InputError, match="2 values were given for 3 experts"):
        merged(Linear(weight=(1.0, 2.0)), None, [1.0], [2.0], [3.0])

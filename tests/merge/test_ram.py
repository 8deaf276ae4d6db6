import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.ram import Ram

from .conftest import merged


def test_worked_by_hand():
    out = merged(Ram(), [1, 1, 1, 1], [3, 1, 2, 1], [1, 1, 4, 1.000001], [1, -1, 1, 1])
    # alone: whole; shared: mean of the two that touched it; too small: nothing
    np.testing.assert_array_equal(out, np.array([3, -1, 3, 1], np.float32))


def test_epsilon_is_exclusive():
    out = merged(Ram(epsilon=0.5), [0, 0], [0.5, 0.75])
    np.testing.assert_array_equal(out, np.array([0, 0.75], np.float32))


def test_bad_epsilon():
    with pytest.raises(InputError, match="ram: epsilon = -1"):
        Ram(epsilon=-1)

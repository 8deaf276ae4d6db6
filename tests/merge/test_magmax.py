import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.magmax import MagMax


def merged(method, base, *experts):
    experts = [{"x": np.array(e, np.float32)} for e in experts]
    return merge_arrays(method, {"x": np.array(base, np.float32)}, experts)["x"]


def test_worked_by_hand():
    out = merged(MagMax(), [1, 1, 1], [2, 0, 1], [0.5, -2, 1])
    np.testing.assert_array_equal(out, np.array([2, -2, 1], np.float32))
    assert out.dtype == np.float32


def test_scale_multiplies_the_update():
    out = merged(MagMax(scale=0.5), [1, 1, 1], [2, 0, 1], [0.5, -2, 1])
    np.testing.assert_array_equal(out, np.array([1.5, -0.5, 1], np.float32))


def test_later_expert_wins_a_tie():
    assert merged(MagMax(), [0], [2], [-2]) == -2
    assert merged(MagMax(), [0], [-2], [2]) == 2


def test_weights_decide_before_the_comparison():
    assert merged(MagMax(weight=(1.0, 3.0)), [0], [2], [-1]) == -3


def test_wrong_number_of_weights():
    with pytest.raises(InputError, match="2 values were given for 3 experts"):
        merged(MagMax(weight=(1.0, 2.0)), [0], [1], [2], [3])

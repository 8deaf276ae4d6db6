import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.nuslerp import NuSlerp
from pluribus.merge.slerp import Slerp

from .conftest import merged


def test_a_right_angle_by_hand():
    third = [np.sin(np.pi / 3), np.sin(np.pi / 6)]
    method = NuSlerp(weight=(2.0, 1.0))
    np.testing.assert_allclose(merged(method, None, [1, 0], [0, 1]), third, atol=1e-7)
    shifted = merged(method, [5, 5], [6, 5], [5, 6])
    np.testing.assert_allclose(shifted, np.add(third, 5), atol=1e-6)


def test_equals_slerp_where_both_are_defined():
    x, y = np.random.default_rng(2).normal(size=(2, 30))
    out = merged(NuSlerp(weight=(0.7, 0.3)), None, x, y)
    np.testing.assert_allclose(out, merged(Slerp(t=0.3), x, y), atol=1e-6)


@pytest.mark.parametrize("row_wise", [False, True])
def test_one_angle_for_each_vector(row_wise):
    x, y = np.random.default_rng(3).normal(size=(2, 4, 5))
    method = NuSlerp(weight=(0.7, 0.3), nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    out = merged(method, None, x, y)
    expected = np.empty((4, 5))
    if row_wise:  # mergekit's "row-wise" runs along the first axis
        for j in range(5):
            expected[:, j] = merged(Slerp(t=0.3), x[:, j], y[:, j])
    else:
        for i in range(4):
            expected[i] = merged(Slerp(t=0.3), x[i], y[i])
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("flatten", [True, False])
def test_opposite_vectors_are_averaged_on_the_line(flatten):
    x = np.random.default_rng(4).normal(size=(1, 9)).astype(np.float32)
    method = NuSlerp(weight=(0.25, 0.75), nuslerp_flatten=flatten)
    np.testing.assert_allclose(merged(method, None, x, -3 * x), -2 * x, rtol=1e-5)


def test_weights_that_cancel_and_weights_that_are_zero():
    with pytest.raises(InputError, match="cancel, so their ratio is undefined"):
        NuSlerp(weight=(1.0, -1.0))
    half = [np.sqrt(0.5)] * 2
    np.testing.assert_allclose(merged(NuSlerp(weight=0.0), None, [1, 0], [0, 1]), half, 1e-6)


def test_takes_two():
    with pytest.raises(InputError, match="3 values were given for 2 experts"):
        NuSlerp(weight=(1.0, 1.0, 1.0))

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.slerp import Slerp

from .conftest import merged


def test_a_right_angle_by_hand():
    third = np.sin(np.pi / 3), np.sin(np.pi / 6)
    np.testing.assert_allclose(merged(Slerp(t=1 / 3), [1, 0], [0, 1]), third, atol=1e-7)
    # lengths are kept in the sum, not only directions
    half = np.sqrt(0.5)
    np.testing.assert_allclose(merged(Slerp(t=0.5), [4, 0], [0, 2]), [4 * half, 2 * half], 1e-6)


@pytest.mark.parametrize(("t", "expected"), [(0, [1, 2, 3]), (1, [3, -1, 0])])
def test_both_ends(t, expected):
    np.testing.assert_allclose(merged(Slerp(t=t), [1, 2, 3], [3, -1, 0]), expected, atol=1e-6)


def test_outside_it_goes_on_along_the_arc():
    np.testing.assert_allclose(merged(Slerp(t=2), [1, 0], [0, 1]), [-1, 0], atol=1e-7)


@pytest.mark.parametrize("expert", [[2, 4], [-1, -2], [1.0001, 2]])
def test_collinear_vectors_are_averaged_on_the_line(expert):
    expected = 0.75 * np.array([1, 2]) + 0.25 * np.array(expert)
    np.testing.assert_allclose(merged(Slerp(t=0.25), [1, 2], expert), expected, atol=1e-6)


def test_zero_has_no_direction():
    np.testing.assert_allclose(merged(Slerp(t=0.5), [0, 0], [0, 2]), [0, 2 * np.sqrt(0.5)], 1e-6)
    np.testing.assert_array_equal(merged(Slerp(t=0.5), [0, 0], [0, 0]), [0, 0])


def test_length_of_unit_vectors_is_kept():
    x, y = np.random.default_rng(1).normal(size=(2, 500))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    for t in (0.1, 0.5, 0.8):
        assert np.linalg.norm(merged(Slerp(t=t), x, y)) == pytest.approx(1, abs=1e-6)


def test_t_is_required():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 't'"):
        Slerp()
    with pytest.raises(InputError, match="slerp: t = 'half'"):
        Slerp(t="half")

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.multislerp import MultiSlerp

from .conftest import merged


def tangent_form(vectors, weights, eps=1e-8):
    """The source's own steps: project, average in the tangent space, map back."""
    weights = np.array(weights) / np.sum(weights)
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / (norms + eps)[:, None]
    mean = weights @ units
    mean = mean / np.linalg.norm(mean)
    tangents = units - (units @ mean)[:, None] * mean
    average = weights @ tangents
    length = np.linalg.norm(average) + eps
    result = mean * np.cos(length) + average * np.sin(length) / length
    return result * (weights @ norms)


def test_worked_by_hand():
    half = np.sqrt(0.5)
    out = merged(MultiSlerp(), None, [3, 0], [0, 4])
    np.testing.assert_allclose(out, [3.5 * half, 3.5 * half], rtol=1e-6)
    shifted = merged(MultiSlerp(), [1, 1], [4, 1], [1, 5])
    np.testing.assert_allclose(shifted, [1 + 3.5 * half, 1 + 3.5 * half], rtol=1e-6)


def test_the_tangent_average_is_zero():
    vectors = np.random.default_rng(5).normal(size=(4, 60))
    weights = (0.5, 0.1, 0.9, 0.2)
    out = merged(MultiSlerp(weight=weights), None, *vectors)
    np.testing.assert_allclose(out, tangent_form(vectors, weights), atol=1e-6)


def test_weights_may_stay_as_they_are():
    out = merged(MultiSlerp(weight=2.0, normalize_weights=False), None, [3, 0], [0, 4])
    np.testing.assert_allclose(out, np.full(2, 14 * np.sqrt(0.5)), rtol=1e-6)


def test_one_expert_is_returned_bit_for_bit():
    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    np.testing.assert_array_equal(merged(MultiSlerp(weight=0.5), np.ones(50), x), x)


def test_directions_that_cancel():
    out = merged(MultiSlerp(), None, [1, 2], [-1, -2])  # two: the line between them
    np.testing.assert_array_equal(out, [0, 0])
    star = [[np.cos(a), np.sin(a)] for a in 2 * np.pi * np.arange(3) / 3]
    with pytest.raises(InputError, match="directions of the 3 experts cancel in tensor 'x'"):
        merged(MultiSlerp(), None, *star)
    assert merged(MultiSlerp(), None, [1], [-1], [3], [-3]) == 0  # one number has no direction


def test_updates_that_are_all_zero():
    np.testing.assert_array_equal(merged(MultiSlerp(), [1, 2], *[[1, 2]] * 3), [1, 2])


def test_bad_weights():
    with pytest.raises(InputError, match="sum to zero"):
        merged(MultiSlerp(weight=(1.0, -1.0)), None, [1, 0], [0, 1])
    with pytest.raises(InputError, match="multislerp: eps = 0"):
        MultiSlerp(eps=0)

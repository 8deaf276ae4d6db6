import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.karcher import Karcher

from .conftest import merged


def slow(vectors, steps=500):
    """Gradient descent on the sum of squared angles, on whole vectors."""
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / norms[:, None]
    mean = units.mean(0) / np.linalg.norm(units.mean(0))
    for _ in range(steps):
        angles = np.arccos(np.clip(units @ mean, -1, 1))
        logs = (angles / np.sin(angles))[:, None] * (units - np.cos(angles)[:, None] * mean)
        mean = mean + 0.5 * logs.mean(0)
        mean = mean / np.linalg.norm(mean)
    return mean * norms.mean()


def test_symmetric_cases_by_hand():
    np.testing.assert_allclose(
        merged(Karcher(), None, [2, 0], [0, 4]), np.full(2, 3 / 2**0.5), 1e-6
    )
    out = merged(Karcher(), None, *np.eye(3))
    np.testing.assert_allclose(out, np.full(3, 1 / 3**0.5), rtol=1e-6)


def test_equals_the_slow_search():
    vectors = np.random.default_rng(6).normal(size=(5, 40)) + 0.5
    out = merged(Karcher(max_iter=100, tol=1e-9), None, *vectors)
    np.testing.assert_allclose(out, slow(vectors), atol=1e-6)


def test_differs_from_the_direction_of_the_sum():
    vectors = np.array([[1, 0, 0], [1, 0.1, 0], [0, 0, 1]])
    out = merged(Karcher(max_iter=100, tol=1e-9), None, *vectors)
    np.testing.assert_allclose(out, slow(vectors), atol=1e-6)
    units = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    chord = units.sum(0) / np.linalg.norm(units.sum(0)) * np.linalg.norm(vectors, axis=1).mean()
    assert abs(out - chord).max() > 0.01


def test_zero_counts_in_the_length_only():
    np.testing.assert_allclose(merged(Karcher(), None, [0, 0], [0, 4]), [0, 2], atol=1e-7)
    np.testing.assert_array_equal(merged(Karcher(), None, [0, 0], [0, 0]), [0, 0])


def test_short_vectors_keep_their_direction():
    out = merged(Karcher(), None, [1e-7, 0], [1e-7, 0])
    np.testing.assert_allclose(out, [1e-7, 0], rtol=1e-5)


def test_opposite_vectors_give_the_first_direction():
    np.testing.assert_allclose(merged(Karcher(), None, [1, 2], [-3, -6]), [2, 4], rtol=1e-6)


def test_close_models_are_told_apart():
    """In float32 their angle is lost, and mergekit is off by as much as they differ."""
    x = np.random.default_rng(7).normal(size=600).astype(np.float32)
    y = (x + np.float32(1e-4) * np.random.default_rng(8).normal(size=600)).astype(np.float32)
    expected = slow(np.array([x, y], np.float64))
    np.testing.assert_allclose(merged(Karcher(), None, x, y), expected, atol=1e-6)


def test_one_expert_is_returned_bit_for_bit():
    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    np.testing.assert_array_equal(merged(Karcher(), None, x), x)


def test_bad_parameters():
    with pytest.raises(InputError, match="karcher: max_iter = 0"):
        Karcher(max_iter=0)
    with pytest.raises(InputError, match="karcher: tol = -1"):
        Karcher(tol=-1)

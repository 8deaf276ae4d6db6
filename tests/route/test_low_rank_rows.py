"""The kernel against one sum over everything, for counts that its steps of four and eight leave."""

import numpy as np
import pytest

from pluribus.kernels import low_rank_rows


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 15, 16, 21])
@pytest.mark.parametrize("places", [0, 1, 3, 4, 7])
def test_it_adds_the_weighted_updates_of_each_rows_own_parts(places, rank):
    rng = np.random.default_rng(places * 100 + rank)
    x = rng.normal(size=(5 * places, 37)).astype(np.float32)
    y = rng.normal(size=(5 * places, 43)).astype(np.float32)
    first = rng.normal(size=(4, rank, 37)).astype(np.float32)
    second = rng.normal(size=(4, rank, 43)).astype(np.float32)
    parts, rows = np.array([3, 1]), np.array([[0, 4, 2, 0, 1], [3, 1, 0, 2, 0]])
    weights = np.array([[1, 0.5, -2, 0, 1], [1, 1, 0, 0.1, 0]], np.float32)
    expected = y.astype(np.float64).reshape(5, places, 43)
    wide = x.astype(np.float64).reshape(5, places, 37)
    for part, some, scales in zip(parts, rows, weights, strict=True):
        for row, scale in zip(some, scales, strict=True):
            expected[row] += scale * wide[row] @ first[part].T @ second[part]
    second[[0, 2]] = np.nan  # parts that nobody uses are not read
    low_rank_rows.add(x, y, first, second, parts, rows, weights, places)
    np.testing.assert_allclose(y.reshape(5, places, 43), expected, rtol=1e-4, atol=1e-3)


def test_a_row_of_weight_nothing_is_not_read():
    x, y = np.ones((2, 6), np.float32), np.zeros((2, 7), np.float32)
    x[0] = np.nan
    first, second = np.ones((1, 3, 6), np.float32), np.ones((1, 3, 7), np.float32)
    table = np.array([0]), np.array([[0, 1]]), np.array([[0, 2]], np.float32)
    low_rank_rows.add(x, y, first, second, *table, 1)
    assert y.tolist() == [[0] * 7, [2 * 6 * 3] * 7]

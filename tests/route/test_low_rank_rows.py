"""The kernel against one sum over everything, for counts that its steps of four and eight leave."""

import numpy as np
import pytest

from pluribus.kernels import low_rank_rows, team


def added(x, y, first, second, table, threads):
    """Add to a copy of y, and return it."""
    y = y.copy()
    places, apart = len(x) // len(table), bool(((table != 0).sum(1) < 2).all())
    rank, entries = first.shape[1], np.count_nonzero(table)
    found = low_rank_rows.Updates(table, places, rank, entries, apart)
    pointers = [array.ctypes.data for array in (x, y, first, second)]
    found.add(*pointers, x.shape[1], y.shape[1], threads)
    return y


ROUTES = {  # rows by parts
    "several parts a row": [[0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0]],
    "one part a row": [[0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]],
    "one part": [[0, 0, 0, 1]] * 5,
    "a row alone": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    "as many entries as rows": [
        [1, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 1],
        [1, 0, 0, 0],
    ],
}


@pytest.fixture(autouse=True)
def many_threads(monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(low_rank_rows, "ALONE", -1)


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 15, 16, 21])
@pytest.mark.parametrize("places", [1, 3, 4, 7])
@pytest.mark.parametrize("route", ROUTES)
def test_it_adds_the_weighted_updates_of_each_rows_own_parts(route, places, rank):
    rng = np.random.default_rng(places * 100 + rank)
    x = rng.normal(size=(5 * places, 37)).astype(np.float32)
    y = rng.normal(size=(5 * places, 43)).astype(np.float32)
    first = rng.normal(size=(4, rank, 37)).astype(np.float32)
    second = rng.normal(size=(4, rank, 43)).astype(np.float32)
    table = (np.array(ROUTES[route]) * rng.normal(size=(5, 4))).astype(np.float32)
    expected = y.astype(np.float64).reshape(5, places, 43)
    wide = x.astype(np.float64).reshape(5, places, 37)
    for row, part in zip(*table.nonzero(), strict=True):
        expected[row] += table[row, part] * wide[row] @ first[part].T @ second[part]
    unused = ~table.any(0)
    first[unused] = second[unused] = np.nan  # parts that nobody uses are not read
    found = [added(x, y, first, second, table, threads) for threads in (1, 2, 3, 5)]
    np.testing.assert_allclose(found[0].reshape(5, places, 43), expected, rtol=1e-4, atol=1e-3)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])  # however many threads


@pytest.mark.parametrize("width", [5, 16, 40, 129])
def test_columns_are_shared_out_among_threads(width):
    rng = np.random.default_rng(width)
    x, first = np.ones((3, 2), np.float32), np.ones((2, 1, 2), np.float32)
    second = rng.normal(size=(2, 1, width)).astype(np.float32)
    y = np.zeros((3, width), np.float32)
    table = np.array([[1, 1], [1, 0], [1, 1]], np.float32)
    for threads in (1, 2, 3, 7):
        found = added(x, y, first, second, table, threads)
        both = 2 * (second[0, 0] + second[1, 0])
        np.testing.assert_allclose(found, [both, 2 * second[0, 0], both], rtol=1e-5)


def test_a_row_that_no_part_has_is_neither_read_nor_written():
    x, y = np.ones((2, 6), np.float32), np.zeros((2, 7), np.float32)
    x[0] = y[0] = np.nan
    first, second = np.ones((1, 3, 6), np.float32), np.ones((1, 3, 7), np.float32)
    found = added(x, y, first, second, np.array([[0], [2]], np.float32), 2)
    assert np.isnan(found[0]).all()
    assert found[1].tolist() == [2 * 6 * 3] * 7


def test_without_the_library_one_thread_does_it():
    """In a process of its own, whose compiler does not know the library's names yet."""
    import subprocess
    import sys

    script = """
import numpy as np
from pluribus.kernels import team
team.OPENMP = {name: "no_such_function" for name in team.OPENMP}
assert team._begin() is None
from pluribus.kernels.low_rank_rows import Updates
x, y = np.ones((4, 3), np.float32), np.zeros((4, 40), np.float32)
first, second = np.ones((2, 5, 3), np.float32), np.ones((2, 5, 40), np.float32)
found = Updates(np.array([[1, 0], [1, 0], [1, 0], [1, 1]], np.float32), 1, 5, 5, False)
found.add(*[a.ctypes.data for a in (x, y, first, second)], 3, 40, 8)
assert (y[:3] == 15).all() and (y[3] == 30).all(), y
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_torch_brings_a_library():
    import torch  # noqa: F401

    assert team._begin() is not None

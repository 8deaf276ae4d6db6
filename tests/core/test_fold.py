"""Folds against the obvious: sort, sum and count whole arrays."""

import itertools

import numpy as np
import pytest
import torch

from pluribus.core.fold import Extremes, Gram, Sum, deltas, magnitudes
from pluribus.core.merger import At
from pluribus.core.order import SMALL, Order, Selection, TopK, share_of

RNG = np.random.default_rng(0)


def values(base, experts):
    return experts


def blocks_of(rows, size, job=0):
    """Cut (t, n) into blocks and their places."""
    n = rows.shape[1]
    return [
        (rows[:, start : start + size], At("x", (n,), start, min(start + size, n), number, job))
        for number, start in enumerate(range(0, n, size))
    ]


def run(fold, blocks, order=None, spans=3):
    """Run a fold to its end over blocks taken in some order by several workers."""
    order = list(range(len(blocks))) if order is None else list(order)
    passes = 0
    while hasattr(fold, "finish"):
        states = []
        for part in np.array_split(order, min(spans, len(order))):
            state = fold.init()
            for k in part:
                state = fold.update(state, fold.of(None, blocks[k][0]), blocks[k][1])
            states.append(state)
        whole = fold.init()
        for state in reversed(states):
            whole = fold.join(whole, state)
        fold = fold.finish(whole)
        passes += 1
    return fold, passes


def shuffled(count):
    return np.random.default_rng(1).permutation(count)


# -- sums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sum_and_gram(dtype):
    rows = RNG.normal(size=(3, 1001)).astype(dtype)
    blocks = blocks_of(rows, 64)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(run(Sum(of=values), blocks)[0], wide.sum(1), rtol=1e-12)
    np.testing.assert_allclose(run(Gram(of=values), blocks)[0], wide @ wide.T, rtol=1e-12)


@pytest.mark.parametrize("fold", [Sum(of=values), Gram(of=values)])
def test_sums_have_the_same_bits_in_any_order(fold):
    rows = (RNG.normal(size=(3, 5000)) * 10.0 ** RNG.integers(-6, 6, 5000)).astype(np.float32)
    blocks = blocks_of(rows, 64)
    first = run(fold, blocks, spans=1)[0]
    for spans in (1, 4, 7):
        np.testing.assert_array_equal(run(fold, blocks, shuffled(len(blocks)), spans)[0], first)


def test_torch_gives_the_same_sums():
    rows = RNG.normal(size=(3, 1000)).astype(np.float32)
    ours = run(Sum(of=values), blocks_of(torch.from_numpy(rows), 100))[0]
    np.testing.assert_array_equal(ours, run(Sum(of=values), blocks_of(rows, 100))[0])


def test_extremes():
    rows = RNG.normal(size=(3, 1000)).astype(np.float32)
    found = run(Extremes(of=values), blocks_of(rows, 70), shuffled(15))[0]
    np.testing.assert_array_equal(found, [rows.min(1), rows.max(1)])


def test_what_folds_may_look_at():
    base, experts = np.array([1.0, 2]), np.array([[3.0, 1]])
    np.testing.assert_array_equal(deltas(base, experts), [[2, -1]])
    np.testing.assert_array_equal(magnitudes(base, experts), [[2, 1]])


# -- ranks -----------------------------------------------------------------------------------------


def fixed(*ranks):
    return lambda size, rows: np.array([[r for r in ranks]] * rows)


INPUTS = {
    "normal": lambda n: abs(RNG.normal(size=(2, n))),
    "many ties": lambda n: np.round(abs(RNG.normal(size=(2, n))), 1),
    "mostly zero": lambda n: abs(RNG.normal(size=(2, n))) * (RNG.random((2, n)) < 0.01),
    "constant": lambda n: np.full((2, n), 0.3),
    "drifting": lambda n: abs(RNG.normal(size=(2, n))) * np.linspace(0.01, 5, n),
    "huge range": lambda n: 10.0 ** RNG.uniform(-30, 30, (2, n)),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1000, 3 * SMALL])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_order_statistics_equal_a_sort(kind, dtype, size, scope):
    rows = INPUTS[kind](size).astype(dtype)
    ranks = (1, 2, size // 1000 + 1, size // 3, size // 3 + 1, size - 1, size)
    blocks = blocks_of(rows, max(size // 13, 1))
    found, passes = run(
        Order(of=values, ranks=fixed(*ranks), scope=scope), blocks, shuffled(len(blocks))
    )
    falling = -np.sort(-rows, axis=1)
    np.testing.assert_array_equal(found.values, falling[:, np.array(ranks) - 1])
    assert found.values.dtype == dtype
    assert found.size == size
    for i, j in np.ndindex(found.values.shape):
        assert found.above[i, j] == (rows[i] > found.values[i, j]).sum()
        assert found.equal[i, j] == (rows[i] == found.values[i, j]).sum()
    assert passes <= (1 if size <= SMALL else 2 if dtype == np.float32 else 4)


@pytest.mark.parametrize("size", [1000, 3 * SMALL])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_signed_values(size, dtype):
    rows = RNG.normal(size=(2, size)).astype(dtype)
    rows[:, ::7] = 0.0
    rows[:, 1::7] = -0.0
    ranks = (1, size // 2, size // 2 + size // 5, size)
    blocks = blocks_of(rows, size // 9)
    found, _ = run(Order(of=values, ranks=fixed(*ranks), signed=True), blocks)
    np.testing.assert_array_equal(found.values, -np.sort(-rows, axis=1)[:, np.array(ranks) - 1])


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("size", [1000, 3 * SMALL])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.77, 1.0])
def test_the_largest_equal_a_stable_sort(kind, size, scope, share):
    rows = INPUTS[kind](size).astype(np.float32)
    blocks = blocks_of(rows, size // 13)
    fold = TopK(of=values, ranks=share_of(share), scope=scope)
    found, _ = run(fold, blocks, shuffled(len(blocks)))
    assert isinstance(found, Selection)
    keep = np.concatenate([found.mask(block, at) for block, at in blocks], axis=1)
    count = max(1, int(share * size))
    expected = np.zeros(rows.shape, bool)
    for row, order in zip(expected, np.argsort(-rows, axis=1, kind="stable"), strict=True):
        row[order[:count]] = True
    np.testing.assert_array_equal(keep, expected)


@pytest.mark.parametrize("size", [500, 2 * SMALL])
def test_nested_selections_and_rank_zero(size):
    rows = np.round(abs(RNG.normal(size=(2, size))), 2).astype(np.float32)
    blocks = blocks_of(rows, size // 7)
    wanted = (size // 2, size // 10, 0, size)
    found, _ = run(TopK(of=values, ranks=fixed(*wanted)), blocks)
    order = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1, kind="stable")
    for j, count in enumerate(wanted):
        keep = np.concatenate([found.mask(block, at, j) for block, at in blocks], axis=1)
        np.testing.assert_array_equal(keep, order < count)


def test_several_tensors_of_one_model():
    tensors = [abs(RNG.normal(size=(2, n))).astype(np.float32) for n in (700, SMALL, 5, SMALL)]
    blocks = list(
        itertools.chain.from_iterable(
            blocks_of(rows, 50_000, job) for job, rows in enumerate(tensors)
        )
    )
    fold = TopK(of=values, ranks=share_of(0.1), scope="model")
    found, _ = run(fold, blocks, shuffled(len(blocks)))
    keep = np.concatenate([found.mask(block, at) for block, at in blocks], axis=1)
    whole = np.concatenate(tensors, axis=1)
    order = np.argsort(np.argsort(-whole, axis=1, kind="stable"), axis=1, kind="stable")
    np.testing.assert_array_equal(keep, order < int(0.1 * whole.shape[1]))


def test_masks_of_matrices_and_torch():
    rows = np.round(abs(RNG.normal(size=(2, 60))), 1).astype(np.float32)
    found, _ = run(TopK(of=values, ranks=share_of(0.3)), blocks_of(rows, 60))
    at = At("x", (60,), 0, 60)
    flat = found.mask(rows, at)
    np.testing.assert_array_equal(found.mask(rows.reshape(2, 6, 10), at).reshape(2, 60), flat)
    np.testing.assert_array_equal(found.mask(torch.from_numpy(rows), at).numpy(), flat)


# -- aimed -----------------------------------------------------------------------------------------


def aimed(fold, rows, blocks, sample):
    """Run a fold whose first pass was aimed by a sample."""
    aim = fold.aim(sample, rows.shape[1])
    states = []
    for part in np.array_split(np.arange(len(blocks)), 3):
        state = fold.init(aim)
        for k in part:
            state = fold.update(state, blocks[k][0], blocks[k][1])
        states.append(state)
    whole = fold.init(aim)
    for state in reversed(states):
        whole = fold.join(whole, state)
    result, passes = fold.finish(whole), 1
    if hasattr(result, "finish"):
        assert not result.aims
        result, more = run(result, blocks)
        passes += more
    return result, passes


def pieces_of(rows, count=32, length=512):
    starts = np.linspace(0, rows.shape[1] - length, count).astype(int)
    return np.stack([rows[:, start : start + length] for start in starts])


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("sample", ["fair", "one end", "shifted"])
def test_an_aimed_pass_finds_what_a_sort_finds(kind, signed, sample):
    size = 3 * SMALL
    rows = INPUTS[kind](size).astype(np.float32)
    if signed:
        rows *= np.where(RNG.random(rows.shape) < 0.5, -1, 1)
    ranks = (1, size // 5, size // 2, size)
    blocks = blocks_of(rows, size // 13)
    taken = {
        "fair": pieces_of(rows),
        "one end": rows[None, :, :9999],
        "shifted": pieces_of(rows) * np.float32(3) + np.float32(0.1),
    }[sample]
    fold = Order(of=values, ranks=fixed(*ranks), signed=signed)
    found, passes = aimed(fold, rows, blocks, taken)
    falling = -np.sort(-rows, axis=1)
    np.testing.assert_array_equal(found.values, falling[:, np.array(ranks) - 1])
    for i, j in np.ndindex(found.values.shape):
        assert found.above[i, j] == (rows[i] > found.values[i, j]).sum()
        assert found.equal[i, j] == (rows[i] == found.values[i, j]).sum()
    if kind in ("normal", "huge range") and sample == "fair":
        assert passes == 1
    assert passes <= 3


def test_an_aimed_selection_breaks_ties_by_place():
    rows = np.round(abs(RNG.normal(size=(2, 2 * SMALL))), 2).astype(np.float32)
    blocks = blocks_of(rows, SMALL // 3)
    count = int(0.2 * rows.shape[1])
    found, passes = aimed(TopK(of=values, ranks=share_of(0.2)), rows, blocks, pieces_of(rows))
    keep = np.concatenate([found.mask(block, at) for block, at in blocks], axis=1)
    order = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1, kind="stable")
    np.testing.assert_array_equal(keep, order < count)
    assert passes == 1


@pytest.mark.parametrize("size", [1000, 3 * SMALL])
@pytest.mark.parametrize("aim", [False, True])
def test_ranks_among_what_is_not_zero(size, aim):
    rows = (abs(RNG.normal(size=(2, size))) * (RNG.random((2, size)) < [[0.3], [0.6]])).astype("f4")
    fold = TopK(of=values, ranks=lambda n, t: np.full((t, 1), n // 4), nonzero=True)
    blocks = blocks_of(rows, size // 7)
    found = aimed(fold, rows, blocks, pieces_of(rows))[0] if aim else run(fold, blocks)[0]
    keep = np.concatenate([found.mask(block, at) for block, at in blocks], axis=1)
    for row, kept in zip(rows, keep, strict=True):
        expected = np.zeros(size, bool)
        expected[np.argsort(-row, kind="stable")[: np.count_nonzero(row) // 4]] = True
        np.testing.assert_array_equal(kept, expected)


def test_shares_of_a_row():
    np.testing.assert_array_equal(share_of((0.5, 0.01), (1.0, 0.2))(10, 2), [[5, 10], [1, 2]])
    np.testing.assert_array_equal(share_of(0.5, official=True)(10, 1), [[6]])
    np.testing.assert_array_equal(share_of(1.0, official=True)(10, 1), [[10]])
    np.testing.assert_array_equal(share_of(0.01, at_least=0)(10, 1), [[0]])


@pytest.mark.parametrize(
    "fold",
    [
        Sum(of=values),
        Gram(of=values),
        Extremes(of=values),
        Order(of=values, ranks=share_of((0.1, 0.2))),
        TopK(of=values, ranks=share_of((0.1, 0.2))),
    ],
)
def test_an_empty_tensor(fold):
    result = fold.finish(fold.init())
    assert not hasattr(result, "finish")
    assert not hasattr(fold.finish(fold.join(fold.init(), fold.init())), "finish")

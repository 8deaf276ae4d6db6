import itertools

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.task_arithmetic import TaskArithmetic
from pluribus.merge.ties import Ties

from .conftest import merged

RNG = np.random.default_rng(22)


def planted(tensors, t=4, seed=0, ties=True):
    """Task vectors with zeros and, if asked, equal sizes, cut from a flat (t, d) matrix."""
    rng = np.random.default_rng(seed)
    d = sum(int(np.prod(shape)) for shape in tensors.values())
    flat = rng.normal(size=(t, d)) * (rng.random((t, d)) < 0.7)
    if ties:
        flat = np.round(flat * 4) / 4
    ends = np.cumsum([int(np.prod(shape)) for shape in tensors.values()])[:-1]
    experts = []
    for row in flat:
        parts = np.split(row, ends)
        experts.append({n: p.reshape(s) for (n, s), p in zip(tensors.items(), parts, strict=True)})
    return flat, experts


def official(flat, density, elect="mass", agg="mean"):
    """The authors' steps on the whole (t, d) matrix: kthvalue, resolve signs, disjoint merge."""
    t, d = flat.shape
    rank = d - int(d * density)
    cut = np.sort(abs(flat), axis=1)[:, rank - 1 : rank] if rank else np.zeros((t, 1))
    kept = flat * (abs(flat) >= cut)
    shares = kept**2 / (kept**2).sum(1, keepdims=True)
    if elect == "mass":
        sign = np.sign(kept.sum(0))
    elif elect == "normfrac":
        sign = np.sign(kept[shares.argmax(0), np.arange(d)])
    else:
        sign = np.sign((np.sign(kept) * shares).sum(0))
    sign = np.where(sign == 0, np.sign(sign.sum()), sign)
    agreeing = kept * np.where(sign > 0, kept > 0, kept < 0)
    if agg == "mean":
        return agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)
    return agreeing.sum(0) if agg == "sum" else abs(agreeing).max(0) * sign


SHAPES = {"a": (6, 7), "b": (), "c": (31,), "d": (2, 3, 4)}


@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
@pytest.mark.parametrize("elect", ["mass", "normfrac", "normmass"])
@pytest.mark.parametrize("density", [0.2, 0.63, 0.99])
def test_the_papers_preset_equals_the_authors_code(agg, elect, density):
    flat, experts = planted(SHAPES, ties=elect == "mass")
    base = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    method = Ties(
        density=density, scope="model", tie="global", count="official", elect=elect, agg=agg
    )
    out = merge_arrays(method, base, experts)
    found = np.concatenate([value.reshape(-1) for value in out.values()])
    np.testing.assert_allclose(found, official(flat, density, elect, agg), rtol=0, atol=1e-15)


def test_worked_by_hand():
    # half of four: {5, 3} and {4, 2} stay
    out = merged(Ties(density=0.5), np.zeros(4), [5, -1, 0.2, 3], [4, 2, -0.1, -1])
    np.testing.assert_array_equal(out, np.array([4.5, 2, 0, 3], np.float32))


def test_the_elected_sign_wins_and_zeros_never_count():
    out = merged(Ties(), np.zeros(3), [3, 0, 2], [-1, 0, 4], [1, -6, 0])
    np.testing.assert_array_equal(out, [2, -6, 3])


def test_weights_vote_and_divide():
    out = merged(Ties(weight=(1.0, 3.0)), [0, 0], [4, 2], [8, -1])
    np.testing.assert_array_equal(out, [7, -1])
    out = merged(Ties(weight=(1.0, 3.0), normalize=False, scale=0.5), [0, 0], [4, 2], [8, -1])
    np.testing.assert_array_equal(out, [14, -1.5])


def test_a_vote_that_cancels():
    assert merged(Ties(), [0], [2], [-2]) == 2
    # the model's majority is minus here, and the cancelled coordinate follows it
    out = merged(Ties(tie="global"), [0, 0, 0], [2, -1, -1], [-2, -1, -1])
    np.testing.assert_array_equal(out, [-2, -1, -1])
    # with no majority either, a sign of zero counts as minus
    assert merged(Ties(tie="global"), [0], [2], [-2]) == -2


def test_exact_count_breaks_ties_by_place():
    out = merged(Ties(density=0.5, agg="sum"), np.zeros(4), [1, 1, -1, 1])
    np.testing.assert_array_equal(out, [1, 1, 0, 0])
    out = merged(Ties(density=0.5, agg="sum", count="official"), np.zeros(4), [1, 1, -1, 1])
    np.testing.assert_array_equal(out, [1, 1, -1, 1])


def test_official_keeps_one_more_for_each_expert():
    experts = RNG.normal(size=(3, 2000))
    exact, more = (
        [np.count_nonzero(merged(Ties(density=0.2, count=count), 0 * x, x)) for x in experts]
        for count in ("exact", "official")
    )
    assert exact == [400] * 3
    assert more == [401] * 3


def test_at_least_one_survives():
    out = merged(Ties(density=0.01), np.zeros(5), [1, 2, 3, -9, 4])
    np.testing.assert_array_equal(out, [0, 0, 0, -9, 0])


@pytest.mark.parametrize("count", ["exact", "official"])
def test_rows(count):
    experts = np.round(RNG.normal(size=(3, 5, 8)) * 4) / 4
    kept = np.zeros_like(experts)
    for t, r in itertools.product(range(3), range(5)):
        row = experts[t, r]
        if count == "exact":
            keep = np.argsort(-abs(row), kind="stable")[:3]
        else:
            keep = abs(row) >= np.sort(abs(row))[-4]
        kept[t, r, keep] = row[keep]
    agrees = np.sign(kept) == np.where(kept.sum(0) >= 0, 1, -1)
    expected = (kept * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    method = Ties(density=0.4, scope="row", count=count)
    out = merged(method, np.zeros((5, 8)), *experts, dtype=np.float64)
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_rescaling_restores_each_norm():
    x = RNG.normal(size=(4, 10)).astype(np.float32)
    for scope in ("tensor", "row", "model"):
        out = merged(Ties(density=0.3, rescale=True, scope=scope), 0 * x, x)
        assert abs(out).sum() == pytest.approx(abs(x).sum(), rel=1e-5)


def test_signs_below_the_cut_change_nothing():
    """The paper's mechanism: noise under the threshold cannot turn a vote."""
    experts = RNG.normal(size=(4, 500)).astype(np.float32)
    noisy = experts.copy()
    for row in noisy:
        small = np.argsort(abs(row))[:400]
        row[RNG.choice(small, 80, replace=False)] *= -1
    method = Ties(density=0.2)
    np.testing.assert_array_equal(
        merged(method, np.zeros(500), *noisy), merged(method, np.zeros(500), *experts)
    )
    average = TaskArithmetic(normalize=True)
    assert (
        merged(average, np.zeros(500), *noisy) != merged(average, np.zeros(500), *experts)
    ).any()


def test_recovers_a_planted_signal_that_averaging_shrinks():
    t, n, support = 5, 1000, 100
    signal = np.zeros(n)
    signal[:support] = 1
    experts = signal + 0.01 * RNG.normal(size=(t, n))
    experts[0, : support // 3] *= -1  # one expert has a third of the signs flipped
    merged_ties = merged(Ties(density=0.1), np.zeros(n), *experts)
    average = experts.mean(0)
    assert (np.sign(merged_ties[:support]) == 1).all()
    flipped = slice(0, support // 3)
    np.testing.assert_allclose(merged_ties[:support], 1, atol=0.05)
    np.testing.assert_allclose(average[flipped], 1 - 2 / t, atol=0.05)


@pytest.mark.parametrize("density", [0, -0.2, 20, (0.5, 1.2)])
def test_bad_density(density):
    with pytest.raises(InputError, match="ties: density"):
        Ties(density=density)


def test_negative_weights():
    with pytest.raises(InputError, match="negative weights need normalize: false"):
        Ties(weight=(1.0, -0.5))
    assert Ties(weight=(1.0, -0.5), normalize=False).normalize is False
    assert Ties(weight=-0.5, agg="sum").agg == "sum"


def test_wrong_number_of_values():
    with pytest.raises(InputError, match="2 values were given for 3 experts"):
        merged(Ties(density=(0.5, 0.5)), [0.0], [1.0], [2.0], [3.0])

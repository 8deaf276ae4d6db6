"""Paired statistics against scipy, hand and slow versions."""

import itertools
import math
import random

import numpy as np
import pytest

from pluribus.agents.thinking import Attempt, Effect, compare
from pluribus.agents.thinking.intervals import bootstrap, flipped, mcnemar, newcombe, wilson
from pluribus.core.errors import FormatError, InputError, MismatchError


def test_mcnemar_is_a_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for gains, losses in itertools.product(range(0, 30, 3), range(0, 30, 4)):
        if gains + losses:
            wanted = stats.binomtest(gains, gains + losses, 0.5).pvalue
            assert mcnemar(gains, losses) == pytest.approx(wanted, abs=1e-12)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == 2 / 32  # by hand


def test_wilson_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for right, n in [(0, 5), (3, 7), (40, 99), (12, 12)]:
        wanted = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        assert wilson(right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_newcombe_in_steps():
    """36 both, 12 gains, 2 losses, none wrong in both: every step by its formula."""
    n, z = 50, 1.959963984540054

    def score(right):
        p = right / n
        root = z * math.sqrt(z * z + 4 * n * p * (1 - p))
        return (2 * n * p + z * z - root) / (2 * (n + z * z)), (2 * n * p + z * z + root) / (
            2 * (n + z * z)
        )

    (l1, u1), (l2, u2) = score(38), score(48)
    phi = -(12 * 2) / math.sqrt(38 * 12 * 48 * 2)  # ad - bc is negative: no correction
    low = 0.2 - math.sqrt((0.96 - l2) ** 2 - 2 * phi * (0.96 - l2) * (u1 - 0.76) + (u1 - 0.76) ** 2)
    high = 0.2 + math.sqrt(
        (u2 - 0.96) ** 2 - 2 * phi * (u2 - 0.96) * (0.76 - l1) + (0.76 - l1) ** 2
    )
    assert newcombe(36, 12, 2, 0) == pytest.approx((low, high), abs=1e-12)
    assert -high == pytest.approx(newcombe(36, 2, 12, 0)[0], abs=1e-12)  # sides change places
    low, high = newcombe(30, 0, 0, 20)  # margins equal, phi near 1: narrow, around 0
    assert low == pytest.approx(-high)
    assert high < 0.06
    assert newcombe(10, 0, 0, 0)[0] <= 0 <= newcombe(10, 0, 0, 0)[1]


def test_newcombe_covers():
    chance, hits = random.Random(0), 0
    for _ in range(1000):
        cells = [0, 0, 0, 0]
        for _ in range(40):
            cells[chance.choices(range(4), (0.4, 0.3, 0.1, 0.2))[0]] += 1
        low, high = newcombe(*cells)
        hits += low <= 0.2 <= high
    assert 0.93 <= hits / 1000 <= 0.985


def test_bootstrap_is_scipys_within_chance():
    stats = pytest.importorskip("scipy.stats")
    told = [1.0] * 30 + [-1.0] * 12 + [0.0] * 108
    ours = bootstrap(told, seed=1)
    theirs = stats.bootstrap(
        (np.array(told),), np.mean, n_resamples=20000, method="percentile", rng=2
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert bootstrap(told, seed=1) == ours


def test_flips_are_scipys_permutation_test():
    stats = pytest.importorskip("scipy.stats")
    told = [0.3, -0.1, 0.7, 0.2, 0.9, -0.4, 0.05, 0.6]

    def p(values, **settings):
        zero = np.zeros(len(values))
        return stats.permutation_test(
            (np.array(values), zero),
            lambda a, b, axis: (a - b).mean(axis),
            permutation_type="samples",
            vectorized=True,
            **settings,
        ).pvalue

    assert flipped(told) == pytest.approx(p(told), abs=1e-12)
    many = [math.sin(i) + 0.3 for i in range(40)]
    assert flipped(many) == pytest.approx(p(many, n_resamples=20000, rng=0), abs=0.01)


def attempts(answers, tokens=1):
    return [Attempt(answer, str(answer), tokens) for answer in answers]


def test_a_pair_by_hand():
    #           both   gain   loss   neither, gain by an unread answer, loss by an unread one
    direct = attempts(["x", "o", "x", "o", None, "x"], 2)
    cot = attempts(["x", "x", "o", "o", "x", None], 12)
    pair = compare(direct, cot, ["x"] * 6, value=3.0, price=0.01)
    assert (pair.n, pair.gains, pair.losses, pair.delta) == (6, 2, 2, 0.0)
    assert pair.extra_tokens == 10
    assert pair.net == pytest.approx(-0.1)
    assert (pair.delta_parsed, pair.n_parsed) == (0.0, 4)
    assert pair.p == 1.0
    assert pair.ci == newcombe(1, 2, 2, 1)
    [right, wrong] = attempts(["x", "o"])
    many = compare([wrong] * 60 + [right] * 60, [right] * 120, ["x"] * 120)
    assert many.delta == 0.5
    assert many.ci == bootstrap([1.0] * 60 + [0.0] * 60)
    assert compare([right], [Attempt(None, "", 0)], ["x"]).delta_parsed is None


def test_an_unread_answer_is_not_the_missing_answer():
    assert compare(attempts([None]), attempts([None]), [None]).gains == 0
    assert compare(attempts(["x"]), attempts([None]), ["x"]).losses == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"value": -1.0}, "the value is -1.0; give 0 or more"),
        ({"price": -0.1}, "the price is -0.1"),
        ({"price": math.nan}, "the price is nan"),
        ({"value": 0.0}, "nothing is at stake"),
    ],
)
def test_prices_out_of_range(settings, told):
    with pytest.raises(InputError, match=told):
        compare(attempts("x"), attempts("x"), ["x"], **settings)


def test_unpaired_attempts():
    with pytest.raises(MismatchError, match="direct has 1 attempts, cot 2, and there are 2"):
        compare(attempts("x"), attempts("xx"), ["x", "x"])
    with pytest.raises(InputError, match="no attempts"):
        compare([], [], [])
    for empty in (bootstrap, flipped):
        with pytest.raises(InputError, match="at least one"):
            empty([])
    with pytest.raises(InputError, match="at least one"):
        wilson(0, 0)


def test_damaged_effects():
    with pytest.raises(FormatError, match="no effect as pluribus writes it"):
        Effect.of({"task": "x"})

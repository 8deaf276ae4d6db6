"""The confidence sequence: its definition written out, its errors, and how soon it decides."""

import math
import random

import pytest

from pluribus.agents.thinking import ConfidenceSequence
from pluribus.agents.thinking.sequential import SHARES
from pluribus.core.errors import InputError


def slow_interval(seen, alpha):
    """What is not refused, on a fine grid of means, each with all of its bets from the start."""

    def refused(m):
        for n in range(1, len(seen) + 1):
            above = [math.prod(1 + f * (x - m) / m for x in seen[:n]) for f in SHARES]
            below = [math.prod(1 + f * (m - x) / (1 - m) for x in seen[:n]) for f in SHARES]
            if max(sum(above), sum(below)) / len(SHARES) >= 2 / alpha:
                return True
        return False

    kept = [k / 200 for k in range(1, 200) if not refused(k / 200)]
    return kept[0], kept[-1]


def test_the_interval_is_what_bets_do_not_refuse():
    chance = random.Random(3)
    seen = [chance.choice((0.0, 0.5, 1.0, 1.0)) for _ in range(40)]
    sequence = ConfidenceSequence(0.0, 1.0, 0.1)
    sequence.add(seen)
    low, high = slow_interval(seen, 0.1)
    assert sequence.interval == pytest.approx((low, high), abs=1 / 200)
    assert sequence.mean == pytest.approx(sum(seen) / 40)
    shifted = ConfidenceSequence(-2.0, 6.0, 0.1)
    shifted.add(8 * x - 2 for x in seen)
    assert shifted.interval == pytest.approx(tuple(8 * e - 2 for e in sequence.interval), abs=1e-9)


def test_one_bet_by_hand():
    """Eight gains: the share f has (1 + f)^8 against no difference."""
    sequence = ConfidenceSequence(-1.0, 1.0, 0.1)
    for n in range(1, 12):
        sequence.add([1.0])
        capital = sum((1 + f) ** n for f in SHARES) / len(SHARES)
        assert sequence.sign() == (capital >= 20)
    assert sequence.sign(-2.0) == 1
    assert sequence.sign(2.0) == -1


def test_equal_outcomes_change_nothing():
    one, other = ConfidenceSequence(-1.0, 1.0), ConfidenceSequence(-1.0, 1.0)
    steps = [1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    one.add(steps)
    other.add(value for step in steps for value in (0.0, step, 0.0))
    assert one.sign() == other.sign() == 0
    one.add([1.0, 1.0, 1.0])
    other.add([0.0, 1.0, 0.0, 1.0, 1.0])
    assert one.sign() == other.sign() == 1


def test_no_observation_says_nothing():
    empty = ConfidenceSequence(-1.0, 3.0)
    assert empty.interval == pytest.approx((-1.0, 3.0), abs=1e-6)
    assert empty.sign() == 0
    assert math.isnan(empty.mean)


def outcomes(delta, chance, n=200):
    """Differences of two modes that are right together mostly; `delta` apart on average."""
    gain = 0.08 + max(delta, 0.0)
    loss = 0.08 + max(-delta, 0.0)
    return chance.choices((1.0, -1.0, 0.0), (gain, loss, 1 - gain - loss), k=n)


def decided(values, alpha=0.05):
    """The sign and after how many, looked at after every eight."""
    sequence = ConfidenceSequence(-1.0, 1.0, alpha)
    for start in range(0, len(values), 8):
        sequence.add(values[start : start + 8])
        if sign := sequence.sign():
            return sign, start + 8
    return 0, len(values)


@pytest.mark.parametrize("delta", [-0.2, -0.05, 0.0, 0.05, 0.2])
def test_decisions_err_no_more_than_alpha(delta):
    """Claim check B of the page: error <= alpha, and 80 problems on average for 0.2."""
    chance = random.Random(f"sequence/{delta}")
    told = [decided(outcomes(delta, chance)) for _ in range(300)]
    wrong = sum(sign * delta < 0 or (delta == 0 and sign != 0) for sign, _ in told) / 300
    assert wrong <= 0.05
    if abs(delta) == 0.2:
        assert sum(n for _, n in told) / 300 <= 80
        assert sum(sign * delta > 0 for sign, _ in told) / 300 >= 0.95


def test_the_interval_covers_at_all_times_with_prices():
    """Net values with costs, looked at after every eight of 80."""
    chance, missed = random.Random(5), 0
    for _ in range(150):
        sequence = ConfidenceSequence(-1.3, 1.1, 0.1)
        out = False
        for _ in range(10):
            steps = outcomes(0.1, chance, 8)
            sequence.add(step - 0.1 - 0.1 * chance.random() for step in steps)
            out |= sequence.sign(0.1 - 0.15) != 0
        missed += out
    assert missed / 150 <= 0.1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((1.0, 1.0), r"lie in \[1.0, 1.0\]"),
        ((0.0, math.inf), "finite"),
        ((0.0, 1.0, 0.0), "alpha is 0.0"),
        ((0.0, 1.0, 1.5), "alpha is 1.5"),
    ],
)
def test_refused(arguments, told):
    with pytest.raises(InputError, match=told):
        ConfidenceSequence(*arguments)
    sequence = ConfidenceSequence(0.0, 1.0)
    with pytest.raises(InputError, match=r"an observation is 1.5, outside \[0, 1\]"):
        sequence.add([1.5])

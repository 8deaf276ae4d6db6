"""A guess for tasks that were not measured, from six yes or no traits.

    P(thinking pays) = 1 / (1 + exp(-(w0 + sum_k w_k x_k))),   x_k in {0, 1}

fitted by Newton's method to the sign of the net value on measured tasks, with a penalty
|w_1..6|^2 / 2 so that few tasks give finite weights. How well it guesses is told by the area under
the curve, each task guessed by the card of the others (leave one task out).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pluribus.core.errors import InputError
from pluribus.tasks.suites import TRAITS

FEWEST = 4  # tasks


@dataclass(frozen=True)
class Card:
    """A fitted model. `weights` are w0 and one a trait; `auc` is None where it can't be told."""

    weights: tuple[float, ...]
    tasks: int
    auc: float | None

    @classmethod
    def fit(cls, traits: Sequence[Mapping[str, bool]], pays: Sequence[bool]) -> "Card":
        """Fit to tasks with their traits. Raises InputError for fewer than 4, or one outcome."""
        if len(traits) < FEWEST or len(set(pays)) < 2:
            raise InputError(
                f"a card needs {FEWEST} tasks or more, some of which gain by thinking and some "
                f"don't; there are {len(traits)}, of which {sum(pays)} gain"
            )
        return cls(tuple(_fitted(traits, pays)), len(traits), left_out(traits, pays))

    def chance(self, traits: Mapping[str, bool]) -> float:
        """Return P(thinking pays). Raises InputError for traits that are not the six."""
        from pluribus.agents.thinking.tasks import check_traits

        if not traits:
            raise InputError(f"there is no card; say yes or no to {', '.join(TRAITS)}")
        check_traits(traits)
        return _sigmoid(sum(w * x for w, x in zip(self.weights, _row(traits), strict=True)))


def left_out(traits: Sequence[Mapping[str, bool]], pays: Sequence[bool]) -> float | None:
    """Return the area under the curve of guesses for tasks left out; None if there is no pair."""
    guesses = []
    for i in range(len(traits)):
        rest = [k for k in range(len(traits)) if k != i]
        weights = _fitted([traits[k] for k in rest], [pays[k] for k in rest])
        guesses.append(sum(w * x for w, x in zip(weights, _row(traits[i]), strict=True)))
    return auc(guesses, pays)


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float | None:
    """Return how often a positive scores above a negative, ties by half; None without a pair."""
    high = [score for score, label in zip(scores, labels, strict=True) if label]
    low = [score for score, label in zip(scores, labels, strict=True) if not label]
    if not high or not low:
        return None
    wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
    return wins / (len(high) * len(low))


def _row(traits: Mapping[str, bool]) -> list[float]:
    return [1.0, *(float(traits[name]) for name in TRAITS)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _fitted(traits: Sequence[Mapping[str, bool]], pays: Sequence[bool]) -> list[float]:
    import numpy as np

    x = np.array([_row(one) for one in traits])
    y = np.array(pays, np.float64)
    penalty = np.diag([1e-3] + [1.0] * len(TRAITS))  # a little on w0: one outcome alone is finite
    w = np.zeros(x.shape[1])

    def loss(w: np.ndarray) -> float:
        z = x @ w
        return float(np.logaddexp(0, z).sum() - y @ z + w @ penalty @ w / 2)

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = x.T @ (p - y) + penalty @ w
        step = np.linalg.solve(x.T @ ((p * (1 - p))[:, None] * x) + penalty, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) and size > 1e-9:
            size /= 2
        w = w - size * step
        if np.abs(step).max() < 1e-10:
            break
    return [float(one) for one in w]

"""Linear mode connectivity: is there a barrier on the straight line between two models?

    S(l)     = score of l A + (1 - l) B                                            l in [0, 1]
    barrier  = max over l of  l S(1) + (1 - l) S(0) - S(l)                         at least 0

in the unit of the score: how far the worst point of the line lies on the bad side of what the ends
promise (Frankle et al., ICML 2020, https://arxiv.org/abs/1912.05671; as Entezari et al., ICLR 2022,
https://arxiv.org/abs/2110.06296, section 2, define it for a loss). Without a barrier the models lie
in one basin, and averages of them have a chance. Several scores by name, such as accuracies by
task, have a barrier each, and their mean one of its own.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.core.errors import InputError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.interpolate import Curve, path

POINTS = 5
Score = Callable[[Weights], float | Mapping[str, float]]


@dataclass(frozen=True)
class Line:
    """Scores between two models, from `start` (l = 0) to `stop` (l = 1)."""

    start: str
    stop: str
    curve: Curve
    higher_is_better: bool

    @property
    def label(self) -> str:
        """Both ends, for people."""
        return f"{self.start} – {self.stop}"

    @property
    def barrier(self) -> float:
        """Height of the barrier of the mean score."""
        return self.curve.barrier

    @property
    def barriers(self) -> dict[str, float]:
        """Height of each score's own barrier."""
        names = list(self.curve.points[0].scores)
        return {name: self._height(name) for name in names}

    def _height(self, name: str) -> float:
        points = self.curve.points
        low, high = points[0], points[-1]
        sign = 1 if self.higher_is_better else -1
        drops = [
            sign * ((1 - p.weight) * low.scores[name] + p.weight * high.scores[name])
            - sign * p.scores[name]
            for p in points
        ]
        return max(0.0, *drops)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "start": self.start,
            "stop": self.stop,
            "barrier": self.barrier,
            "barriers": self.barriers,
            "points": [
                {"weight": p.weight, "score": p.score, "scores": dict(p.scores)}
                for p in self.curve.points
            ],
        }


@dataclass(frozen=True)
class Connectivity:
    """All lines that were walked."""

    lines: tuple[Line, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"lines": [line.to_dict() for line in self.lines]}


def connectivity(
    pool: Pool,
    score: Score,
    *,
    points: int = POINTS,
    higher_is_better: bool = True,
    with_base: bool = True,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Connectivity:
    """Score the straight lines between all experts, and from the base to each.

    `score(weights)` gives one number, or several by name; it is called once for each end and
    `points - 2` times for each line. Raises InputError for fewer than three points, one model, or
    a score that is not finite.
    """
    if points < 3:
        raise InputError(f"points = {points}: give 3 or more; between its ends a line needs one")
    models = {label: weights for label, weights in pool.experts.items()}
    if with_base and pool.base is not None:
        models = {pool.base.label: pool.base} | models
    if len(models) < 2:
        raise InputError("a line needs two models, and one was given; give another, or the base")
    pairs = list(itertools.combinations(models, 2))
    total = len(models) + len(pairs) * (points - 2)
    ends: dict[int, float | Mapping[str, float]] = {}
    done = 0

    def counted(weights: Weights) -> float | Mapping[str, float]:
        nonlocal done
        found = score(weights)
        done += 1
        if on_step:
            on_step("connectivity", done, total)
        return found

    lines = []
    for start, stop in pairs:
        curve = _walk(models[start], models[stop], counted, ends, points, higher_is_better)
        lines.append(Line(start, stop, curve, higher_is_better))
    return Connectivity(tuple(lines))


def _walk(
    start: Weights,
    stop: Weights,
    score: Score,
    ends: dict[int, float | Mapping[str, float]],
    points: int,
    higher_is_better: bool,
) -> Curve:
    """Score one line; the models at its ends only once each, and as they are."""
    shares: Sequence[float] = [i / (points - 1) for i in range(points)]
    waiting = iter(shares)

    def along(weights: Weights) -> float | Mapping[str, float]:
        share = next(waiting)
        if share not in (0.0, 1.0):
            return score(weights)
        end = stop if share else start
        if id(end) not in ends:
            ends[id(end)] = score(end)
        return ends[id(end)]

    return path(
        stop, start, shares, along, higher_is_better=higher_is_better, barrier_limit=float("inf")
    )

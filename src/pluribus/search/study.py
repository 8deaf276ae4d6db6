"""What a search returns: trials, the best of them, and the front of those that nothing beats.

a dominates b   <=>   a is as good in every objective and better in one
front           =     the trials that no other dominates
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pluribus.core.errors import InputError

if TYPE_CHECKING:
    from pluribus.search.space import Space

Direction = Literal["max", "min"]
Status = Literal["done", "failed", "running"]


@dataclass(frozen=True)
class Objective:
    """A figure to make large or small."""

    name: str
    direction: Direction = "max"

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is."""
        return 1 if self.direction == "max" else -1


@dataclass(frozen=True)
class Trial:
    """One point of a space and what it scored."""

    number: int  # from 0, in the order of proposals
    dna: Any = field(repr=False)  # pg.DNA: the point's coordinates in the space
    seed: int
    status: Status = "running"
    scores: Mapping[str, float] = field(default_factory=dict)  # by objective
    metrics: Mapping[str, float] = field(default_factory=dict)  # other figures
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    seconds: float = 0.0
    settled: int = 0  # earlier trials whose scores the algorithm knew when it proposed this one
    error: str | None = None  # why it failed

    def figure(self, name: str) -> float:
        """Return an objective or a metric by name; NaN where the trial has none."""
        return float(self.scores.get(name, self.metrics.get(name, math.nan)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "number": self.number,
            "dna": {k: v for k, v in self.dna.to_json().items() if k != "metadata"},
            "seed": self.seed,
            "status": self.status,
            "scores": dict(self.scores),
            "metrics": dict(self.metrics),
            "report": dict(self.report),
            "seconds": self.seconds,
            "error": self.error,
        }


@dataclass(frozen=True)
class Study:
    """The outcome of a search."""

    space: "Space" = field(repr=False)
    objectives: tuple[Objective, ...]
    algorithm: str
    seed: int
    trials: tuple[Trial, ...] = field(repr=False)
    seconds: float = 0.0  # of this run; trials from a store took theirs earlier
    resumed: int = 0  # trials that a store held already
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> tuple[Trial, ...]:
        """The trials that have scores."""
        return tuple(trial for trial in self.trials if trial.status == "done")

    @property
    def best(self) -> Trial:
        """The best trial by the first objective, the earliest of equals.

        Raises InputError if no trial succeeded.
        """
        first = self.objectives[0]
        if not self.done:
            told = next((t.error for t in self.trials if t.error), "no trial was finished")
            raise InputError(f"none of {len(self.trials)} trials has a score: {told}")
        return max(self.done, key=lambda t: (first.sign * t.scores[first.name], -t.number))

    @property
    def best_value(self) -> Any:
        """The object that the best trial evaluated."""
        return self.value(self.best)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials that no other dominates, from the best in the first objective on.

        Of several trials with the same scores the earliest stands for all.
        """
        return front(self.done, self.objectives)

    def value(self, trial: Trial) -> Any:
        """Return the object that a trial evaluated."""
        return self.space.decode(trial.dna)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "space": {"digest": self.space.digest, "size": self.space.size},
            "objectives": {o.name: o.direction for o in self.objectives},
            "best": self.best.number if self.done else None,
            "front": [trial.number for trial in self.front],
            "trials": [trial.to_dict() for trial in self.trials],
            "seconds": self.seconds,
            "resumed": self.resumed,
            "notes": list(self.notes),
        }


OnTrial = Callable[[Trial, Study], None]


def front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[Trial, ...]:
    """Return the trials that no other dominates, best in the first objective first."""
    rows = {t.number: tuple(o.sign * t.scores[o.name] for o in objectives) for t in trials}
    ordered = sorted(trials, key=lambda t: (tuple(-x for x in rows[t.number]), t.number))
    kept: list[Trial] = []
    for trial in ordered:  # what dominates a trial stands before it
        row = rows[trial.number]
        if not any(all(a >= b for a, b in zip(rows[k.number], row, strict=True)) for k in kept):
            kept.append(trial)
    return tuple(kept)


@dataclass
class Session:
    """What an algorithm with shared weights is given besides the space and what evaluates it.

    It says how long to go on, and takes what was found: every point that the algorithm measured
    becomes a trial, is stored at once, and counts for the study's best and front.
    """

    seed: int
    trials: int  # at most so many are to be recorded
    objectives: tuple[Objective, ...]
    costs: Mapping[str, Callable[[Any], float]]  # by name, functions of the object
    deadline: float | None  # in time.monotonic()'s seconds
    _record: Callable[..., Trial] = field(repr=False)
    known: list[Trial] = field(default_factory=list)  # recorded so far, a store's included
    notes: list[str] = field(default_factory=list)  # what the user is to be told

    @property
    def over(self) -> bool:
        """Whether the time or the number of trials is used up."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return late or len(self.known) >= self.trials

    def record(
        self,
        dna: Any,
        scores: float | Mapping[str, float],
        *,
        report: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> Trial:
        """Add a point and what it scored: one number, or all objectives (and metrics) by name.

        A NaN is recorded as failed. Raises InputError if an objective is missing.
        """
        trial = self._record(dna, scores, report or {}, seconds)
        self.known.append(trial)
        return trial

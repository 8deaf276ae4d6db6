"""Merge by the methods that are forecast to lose least, score each merge, and tell which is best.

    kept(method) = mean over names of score(merge, n) / highest score of an expert on n

A forecast knows pools that were measured once; a few rows of one's own tasks know this pool (claim
`recommendation`). Every expert is scored once, and every merge once; merges live in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights

Score = Callable[[Weights], float | Mapping[str, float]]
USUAL = ("linear", "task_arithmetic(scale=0.3)", "ties(density=0.2)", "iso_c")  # without forecasts


@dataclass(frozen=True)
class Trial:
    """One method's merge of a pool, scored."""

    method: str  # as `merge` reads it
    scores: dict[str, float]
    kept: float  # share of the best experts' scores, the mean over names


@dataclass(frozen=True)
class Trials:
    """All merges that were tried, the best first; of equal ones the one tried first."""

    tried: tuple[Trial, ...]
    ceilings: dict[str, float]  # highest score of an expert, by name

    @property
    def best(self) -> Trial:
        """The merge that kept most."""
        return self.tried[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "ceilings": dict(self.ceilings),
            "tried": [
                {"method": one.method, "kept": one.kept, "scores": dict(one.scores)}
                for one in self.tried
            ],
        }


def trials(
    pool: Pool,
    methods: Sequence[str],
    score: Score,
    *,
    threads: int | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Trials:
    """Score a merge of the pool by each method; higher scores are better.

    `score(weights)` gives one number, or several by name. Raises InputError for no methods or a
    name on which no expert scores above 0, NonFiniteError for a score that is not finite, and what
    a merge raises.
    """
    from pluribus.engine.driver import merge

    if not methods:
        raise InputError("name at least one method to try")
    total, done = len(pool.experts) + len(methods), 0

    def scored(weights: Weights, label: str) -> dict[str, float]:
        nonlocal done
        told = score(weights)
        found = {k: float(v) for k, v in told.items()} if isinstance(told, Mapping) else {}
        if not isinstance(told, Mapping):
            found = {"score": float(told)}
        for name, value in found.items():
            if not abs(value) < float("inf"):
                raise NonFiniteError(f"{label}: its {name} is {value}; nothing can be compared")
        done += 1
        if on_step is not None:
            on_step("trials", done, total)
        return found

    own = [scored(expert, label) for label, expert in pool.experts.items()]
    ceilings = {name: max(scores[name] for scores in own) for name in own[0]}
    for name, value in ceilings.items():
        if value <= 0:
            raise InputError(f"no expert scores above 0 on {name}: a share of that says nothing")
    folder = pool.models[0].folder
    found = []
    for method in methods:
        weights = merge(pool, method, threads=threads)
        weights.folder = weights.folder or folder
        scores = scored(weights, method)
        kept = sum(scores[name] / ceilings[name] for name in ceilings) / len(ceilings)
        found.append(Trial(method, scores, kept))
    return Trials(tuple(sorted(found, key=lambda one: -one.kept)), ceilings)


def methods_to_try(expected: Sequence[str], first: str, count: int) -> list[str]:
    """Return so many methods: those that are forecast, best first, or the usual ones."""
    if count < 1:
        raise InputError(f"{count} methods to try; give 1 or more")
    return list(dict.fromkeys([*expected] or [first, *USUAL]))[:count]

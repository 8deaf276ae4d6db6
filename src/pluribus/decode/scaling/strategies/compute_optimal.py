"""Compute-optimal scaling: the strategy that was best for problems as hard as this one.

Snell et al. 2024, https://arxiv.org/abs/2408.03314, section 3. Problems of a development set are
cut into bins by difficulty (equal shares; the mean score of a verifier, or the share of right
samples), and for each bin the strategy with the highest accuracy within the budget is noted: `fit`.
At test time the mean verifier score of the first `probe` samples places a problem, and its bin's
strategy runs on what is left of the budget. Strategies of whole samples use the probe's first.

The edges come from whatever difficulty `fit` was given; give it mean verifier scores of as many
samples as `probe`, or the bins will not be those of the test.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from pluribus.core.errors import InputError
from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling._pooled import Handed
from pluribus.decode.scaling._run import Run, best_of
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import (
    DRAWN,
    Completion,
    Cost,
    Generator,
    Problem,
    Sampling,
    Scaled,
    Verifier,
)
from pluribus.decode.scaling.strategies import build, facts, strategy


@strategy("compute_optimal", kind="hybrid", verifier="required", paper="arXiv:2408.03314")
@dataclass(frozen=True, kw_only=True)
class ComputeOptimal:
    """Chooses a strategy by how hard a problem looks."""

    edges: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)  # mean scores between bins, rising
    # By bin, the hardest first: strategies, their names, or mappings with `kind`.
    choices: tuple[Any, ...] = ("weighted", "weighted", "best_of_n", "best_of_n", "sample")
    probe: PositiveInt = 4
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for edges that don't rise, or another number of choices than bins."""
        if list(self.edges) != sorted(set(self.edges)):
            raise InputError(f"compute_optimal: the edges {self.edges} must rise")
        if len(self.choices) != len(self.edges) + 1:
            raise InputError(
                f"compute_optimal: {len(self.edges)} edges make {len(self.edges) + 1} bins, but "
                f"there are {len(self.choices)} choices; give one a bin"
            )
        for each in self.choices:
            _strategy(each)

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget, draws=self.probe)
        made = run.sample(self.probe)
        scores = [one.score for one in map(run.of, made) if one.score is not None]
        level = sum(scores) / len(scores) if scores else 0.0
        place = bisect_right(self.edges, level)
        chosen = _strategy(self.choices[place])
        run.tell("bin", mean=level, bin=place, strategy=facts(chosen).name)
        pooled = facts(chosen).pooled
        handed = Handed(made if pooled else [], generator)
        rest = _left(budget or Budget(), run, made if pooled else [])
        if rest is None:
            found = [run.of(one) for one in made]
            return run.done(found, best_of(found))
        done = chosen.run(run.problem, handed, verifier, rest)
        return replace(
            done,
            cost=_sum(run.meter.cost, done.cost, handed.given),
            trace=(*run.events, *done.trace),
        )


def _sum(probe: Cost, rest: Cost, again: Sequence[Completion]) -> Cost:
    """Return what both used; completions that were handed on were paid for once."""
    return Cost(
        tokens=probe.tokens + rest.tokens - sum(one.tokens for one in again),
        calls=probe.calls + rest.calls - len(again),
        seconds=probe.seconds,  # its clock has run all the time
        verifier_tokens=probe.verifier_tokens + rest.verifier_tokens,
        verifier_calls=probe.verifier_calls + rest.verifier_calls,
        appended=rest.appended,
    )


def _left(budget: Budget, run: Run, again: Sequence[Completion]) -> Budget | None:
    """Return what the chosen strategy may use, or None if that is nothing.

    It counts what is handed on to it once more, so that is added.
    """
    used = run.meter.cost
    tokens, calls, seconds = budget.tokens, budget.calls, budget.seconds
    if tokens is not None:
        tokens += sum(one.tokens for one in again) - used.all_tokens
    if calls is not None:
        calls += len(again) - used.calls
    if seconds is not None:
        seconds -= used.seconds
    if any(left is not None and left <= 0 for left in (tokens, calls, seconds)):
        return None
    return Budget(tokens=tokens, calls=calls, seconds=seconds)


def _strategy(given: Any) -> Any:
    return given if hasattr(given, "run") else build(given)


class Measured(NamedTuple):
    """How one strategy did on one development problem."""

    strategy: Any  # a strategy, or what `build` makes one of
    difficulty: float  # the problem's: mean score of its first samples, high for easy ones
    right: bool
    tokens: float


def fit(
    runs: Sequence[Measured], *, budget: float, bins: int = 5, probe: int = 4
) -> ComputeOptimal:
    """Return the strategy that takes, for each bin of difficulty, what was best within a budget.

    `budget` is in mean tokens a problem. Of equally accurate strategies the one with fewer tokens
    is taken. Raises InputError if no strategy stays within the budget in some bin.
    """
    if not runs or bins < 1:
        raise InputError(f"{len(runs)} runs in {bins} bins: give at least one of each")
    levels = sorted({run.difficulty for run in runs})
    cuts = [levels[len(levels) * i // bins] for i in range(1, bins)]
    edges = tuple(sorted(set(cuts) - {levels[0]}))
    choices = []
    for place in range(len(edges) + 1):
        own = [run for run in runs if bisect_right(edges, run.difficulty) == place]
        choices.append(_best(own, budget, place))
    return ComputeOptimal(edges=edges, choices=tuple(choices), probe=probe)


def _best(runs: Sequence[Measured], budget: float, place: int) -> Any:
    by: dict[str, list[Measured]] = {}
    for run in runs:
        by.setdefault(repr(run.strategy), []).append(run)
    told: Mapping[str, tuple[float, float]] = {
        name: (
            sum(run.right for run in rows) / len(rows),
            sum(run.tokens for run in rows) / len(rows),
        )
        for name, rows in by.items()
    }
    within = [name for name, (_, tokens) in told.items() if tokens <= budget]
    if not within:
        raise InputError(
            f"bin {place}: no strategy uses {budget:g} tokens or fewer; the cheapest uses "
            f"{min(tokens for _, tokens in told.values()):g}"
        )
    top = max(within, key=lambda name: (told[name][0], -told[name][1]))
    return by[top][0].strategy

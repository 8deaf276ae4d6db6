"""Accuracy against tokens: of one pool of samples, for every strategy of whole samples at once.

For each size k the strategy runs on subsets of k of the n samples, by the very code that would draw
them. `subsets` of them are drawn with a seed, the same for all strategies, in an order that is
drawn too (an early stop depends on it); k = n takes all samples in their own order, once. The mean
over subsets and problems is one point; its standard error is that of problems, whose chance is the
larger one by far.

    accuracy(k) = mean_problems mean_subsets right
    tokens(k)   = mean_problems mean_subsets tokens

Strategies that depend on what was written before run as they are, and give one point each.
"""

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pluribus.core.errors import InputError
from pluribus.decode.scaling._pooled import Handed
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.measures import pass_at_k, scalability
from pluribus.decode.scaling.pool import OnStep, Pool
from pluribus.decode.scaling.strategies import facts


@dataclass(frozen=True)
class Point:
    """A strategy at one size."""

    strategy: str
    n: int | None  # samples, at most; None where a strategy has no such number
    accuracy: float
    error: float  # standard error over problems
    tokens: float  # mean of a problem, the verifier's included
    calls: float
    verifier_calls: float
    answered: float  # share of problems for which there was an answer at all

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        from dataclasses import asdict

        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    right: bool
    answered: bool
    tokens: float
    calls: float
    verifier_calls: float

    @classmethod
    def of(cls, problem: Problem, done: Scaled) -> "Outcome":
        """Judge a result by the problem's answer."""
        return cls(
            right=done.answer is not None and done.answer == problem.answer,
            answered=done.answer is not None,
            tokens=done.cost.all_tokens,
            calls=done.cost.calls,
            verifier_calls=done.cost.verifier_calls,
        )


class Remembered:
    """A verifier that is asked once for each candidate of a problem; tokens count every time.

    So each point pays for its own verification, though it was done once.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._known: dict[tuple[str, tuple[str, ...]], tuple[list[float], int, int]] = {}
        free = getattr(verifier, "tokens", None) is None  # then there is nothing to count
        self.tokens: int | None = None if free else 0
        self.calls = 0

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return the verifier's scores."""
        key = (problem.id or problem.question, tuple(candidate))
        if key not in self._known:
            tokens, calls = _used(self._verifier)
            scores = self._verifier.score(problem, candidate)
            after = _used(self._verifier)
            self._known[key] = (scores, after[0] - tokens, after[1] - calls)
        scores, tokens, calls = self._known[key]
        if self.tokens is not None:
            self.tokens += tokens
        self.calls += calls
        return scores


def _used(verifier: Any) -> tuple[int, int]:
    return getattr(verifier, "tokens", 0) or 0, getattr(verifier, "calls", 0) or 0


def sizes(n: int) -> list[int]:
    """Return 1, 2, 4, ... and n."""
    found, k = [], 1
    while k < n:
        found.append(k)
        k *= 2
    return [*found, n]


def curve(
    strategies: Mapping[str, Any],
    problems: Sequence[Problem],
    pool: Pool,
    verifier: Verifier | None = None,
    *,
    ns: Iterable[int] | None = None,
    subsets: int = 16,
    budget: Budget | None = None,
    seed: int = 0,
) -> list[Point]:
    """Return points of strategies that draw whole samples, by name, for each size.

    A problem with fewer samples than a size, because its tokens were spent, gives what it has.
    Raises InputError for a strategy of another kind, a problem without answer or samples, or a
    size out of range.
    """
    if subsets < 1:
        raise InputError(f"subsets is {subsets}; give at least 1")
    for name, strategy in strategies.items():
        if not facts(strategy).pooled:
            raise InputError(f"{name} does not draw whole samples, so no pool serves it")
    drawn = {}
    for place, problem in enumerate(problems):
        if problem.answer is None:
            raise InputError(f"problem {place + 1} has no answer, so nothing can be told of it")
        drawn[place] = pool.samples(problem)
        if not drawn[place]:
            raise InputError(f"the pool has no sample of problem {place + 1}; fill it first")
    most = max(map(len, drawn.values()))
    wanted = sizes(most) if ns is None else sorted(set(ns))
    if wanted[0] < 1:
        raise InputError(f"a size is {wanted[0]}; give at least 1")
    judge = None if verifier is None else Remembered(verifier)
    points = []
    for name, strategy in strategies.items():
        for k in wanted:
            outcomes = []
            for place, problem in enumerate(problems):
                orders = subsets_of(len(drawn[place]), k, subsets, f"{seed}/{place}/{k}")
                outcomes.append(
                    [
                        Outcome.of(
                            problem,
                            replace(strategy, n=k).run(
                                problem, Handed([drawn[place][i] for i in order]), judge, budget
                            ),
                        )
                        for order in orders
                    ]
                )
            points.append(point(name, k, outcomes))
    return points


def _for(problem: Problem, strategy: Any) -> Any:
    """Return a strategy that draws by the problem's own chance, as pools do.

    One that has no `sampling` to change is returned as it is.
    """
    known = getattr(strategy, "sampling", None)
    if not isinstance(known, Sampling):
        return strategy
    return replace(strategy, sampling=replace(known, seed=problem.seed(known.seed)))


def subsets_of(n: int, k: int, count: int, seed: str) -> list[list[int]]:
    """Return subsets of k of n samples by chance; all in order, once, for k >= n."""
    if k >= n:
        return [list(range(n))]
    chance = random.Random(seed)
    return [chance.sample(range(n), k) for _ in range(count)]


def point(name: str, n: int | None, outcomes: Sequence[Sequence[Outcome]]) -> Point:
    """Return the mean over problems of the means over runs."""

    def mean(what: str) -> list[float]:
        return [statistics.fmean(float(getattr(one, what)) for one in runs) for runs in outcomes]

    right = mean("right")
    spread = statistics.stdev(right) / len(right) ** 0.5 if len(right) > 1 else float("nan")
    told = {
        what: statistics.fmean(mean(what))
        for what in ("tokens", "calls", "verifier_calls", "answered")
    }
    return Point(name, n, statistics.fmean(right), spread, **told)


def live(
    strategies: Mapping[str, Any],
    problems: Sequence[Problem],
    generator: Generator,
    verifier: Verifier | None = None,
    budget: Budget | None = None,
    *,
    pool: Pool | None = None,
    told: OnStep | None = None,
) -> list[Point]:
    """Run strategies on all problems, each by a chance of its own: one point each.

    With a pool, results are kept in its file and not found twice. They are known by the strategy's
    name and parameters, and the budget.
    """
    points = []
    for name, strategy in strategies.items():
        outcomes = []
        key = f"{name}: {strategy!r} {budget or Budget()} {type(verifier).__name__}"
        for place, problem in enumerate(problems):
            kept = None if pool is None else pool.result(key, problem)
            if kept is None:
                done = _for(problem, strategy).run(problem, generator, verifier, budget)
                kept = {
                    "answer": done.answer,
                    "tokens": done.cost.all_tokens,
                    "calls": done.cost.calls,
                    "verifier_calls": done.cost.verifier_calls,
                }
                if pool is not None:
                    pool.keep(key, problem, kept)
            answer = kept["answer"]
            outcomes.append(
                [
                    Outcome(
                        answer is not None and answer == problem.answer,
                        answer is not None,
                        kept["tokens"],
                        kept["calls"],
                        kept["verifier_calls"],
                    )
                ]
            )
            if told is not None:
                told(name, place + 1, len(problems))
        points.append(point(name, getattr(strategy, "n", None), outcomes))
    return points


def passes(problems: Sequence[Problem], pool: Pool, ns: Iterable[int]) -> dict[int, float]:
    """Return the mean pass@k of a pool by k, over problems with k samples or more."""
    found: dict[int, float] = {}
    for k in sorted(set(ns)):
        told = []
        for problem in problems:
            samples = pool.samples(problem)
            if len(samples) >= k:
                right = sum(problem.find(one.text) == problem.answer for one in samples)
                told.append(pass_at_k(len(samples), right, k))
        if told:
            found[k] = statistics.fmean(told)
    return found


def slopes(points: Sequence[Point]) -> dict[str, float]:
    """Return the scalability of each strategy with two points or more: accuracy a token."""
    by: dict[str, dict[float, float]] = {}
    for one in points:
        by.setdefault(one.strategy, {})[one.tokens] = one.accuracy
    return {name: scalability(told) for name, told in by.items() if len(told) > 1}

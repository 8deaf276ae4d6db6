"""Strategies side by side on a task: the table, the curve and the page of `pluribus scale`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pluribus import report
from pluribus.core.errors import InputError
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.curves import Point, curve, live, passes, sizes, slopes
from pluribus.decode.scaling.interface import Generator, Verifier
from pluribus.decode.scaling.pool import OnStep, Pool
from pluribus.decode.scaling.problems import Problems
from pluribus.decode.scaling.strategies import facts

FORMS = {
    "accuracy": ".1%",
    "±": ".1%",
    "tokens": ",.0f",
    "calls": ".1f",
    "judged": ".1f",
    "answered": ".1%",
}


@dataclass(frozen=True)
class Comparison:
    """What strategies reached on one task, and at what cost."""

    model: str
    task: str
    problems: int
    points: tuple[Point, ...]
    passes: Mapping[int, float]  # pass@k by k: what a perfect verifier would reach
    slopes: Mapping[str, float]  # scalability: accuracy a token

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.model,
            "task": self.task,
            "problems": self.problems,
            "points": [point.to_dict() for point in self.points],
            "pass_at_k": {str(k): value for k, value in self.passes.items()},
            "scalability": dict(self.slopes),
        }

    def rows(self) -> tuple[list[str], list[list[str | int | float | None]]]:
        """Return the head and the rows of the table."""
        head = ["strategy", "n", *FORMS]
        return head, [
            [
                point.strategy,
                point.n,
                point.accuracy,
                point.error,
                point.tokens,
                point.calls,
                point.verifier_calls,
                point.answered,
            ]
            for point in self.points
        ]

    def table(self) -> str:
        """Return the table for a terminal, and pass@k below it."""
        told = report.aligned(*self.rows(), FORMS)
        if self.passes:
            line = ", ".join(f"{k}: {value:.1%}" for k, value in self.passes.items())
            told += f"\n\npass@k of the samples, {line}"
        return told

    def page(self) -> str:
        """Return a page with accuracy against tokens, and the table."""
        spots = [
            (
                point.strategy if point.n is None else f"{point.strategy} ({point.n})",
                max(point.tokens, 1.0),
                100 * point.accuracy,
            )
            for point in self.points
        ]
        groups = {spot[0]: point.strategy for spot, point in zip(spots, self.points, strict=True)}
        parts = [
            report.section(
                "Accuracy against tokens",
                "Each mark is a strategy at one size; tokens are the mean of a problem, those of "
                "verifiers included.",
                report.scatter(
                    f"Accuracy on {self.task}",
                    spots,
                    x_label="tokens a problem",
                    y_label="accuracy, %",
                    groups=groups,
                    log_x=True,
                    labelled=(),
                ),
            ),
            report.section("All figures", report.table(*self.rows(), FORMS)),
        ]
        if self.passes:
            rows = [[k, value] for k, value in self.passes.items()]
            told = report.table(["k", "pass@k"], rows, {"pass@k": ".1%"})
            parts.append(
                report.section(
                    "pass@k", "How often one of k samples is right: a perfect verifier.", told
                )
            )
        title = f"{Path(self.model).name} on {self.task}"
        return report.page(title, parts, subtitle=f"{self.problems} problems")


def compare(
    strategies: Mapping[str, Any],
    task: Problems,
    generator: Generator,
    verifier: Verifier | None = None,
    *,
    model: str = "model",
    budget: Budget | None = None,
    pool: Pool | None = None,
    batch: int = 1,
    subsets: int = 16,
    told: OnStep | None = None,
) -> Comparison:
    """Run strategies on a task: those of whole samples by one pool, the others as they are.

    The pool is filled with as many samples as the largest of them asks for. Raises InputError for
    problems without answers, or what strategies raise, before anything is drawn.
    """
    check(strategies, task, generator, verifier)
    pooled = {name: one for name, one in strategies.items() if facts(one).pooled}
    others = {name: one for name, one in strategies.items() if name not in pooled}
    points: list[Point] = []
    reached: dict[int, float] = {}
    if pooled:
        shared = Pool(task.sampling) if pool is None else pool
        most = max(one.n for one in pooled.values())
        tokens = None if budget is None else budget.tokens
        shared.fill(task.problems, generator, most, batch=batch, tokens=tokens, told=told)
        for name, one in pooled.items():
            points += curve(
                {name: one},
                task.problems,
                shared,
                verifier,
                ns=sizes(one.n),
                subsets=subsets,
                budget=budget,
            )
        reached = passes(task.problems, shared, sizes(most))
    points += live(others, task.problems, generator, verifier, budget, pool=pool, told=told)
    kept = {name: value for name, value in slopes(points).items() if math.isfinite(value)}
    return Comparison(model, task.name, len(task.problems), tuple(points), reached, kept)


def check(
    strategies: Mapping[str, Any],
    task: Problems,
    generator: Generator,
    verifier: Verifier | None = None,
) -> None:
    """Raise InputError for what `compare` could not do, before anything is drawn or written."""
    for place, problem in enumerate(task.problems, 1):
        if problem.answer is None:
            raise InputError(
                f"problem {place} of {task.name} has no answer, so accuracy cannot be told"
            )
    needy = [name for name, one in strategies.items() if facts(one).verifier == "required"]
    if needy and verifier is None:
        free = [name for name in strategies if name not in needy]
        raise InputError(
            f"{needy[0]} needs a verifier; give one"
            + (f", or compare {', '.join(free)} alone" if free else "")
        )
    steps = [name for name, one in strategies.items() if facts(one).continues]
    if steps and not getattr(generator, "continues", True):
        raise InputError(
            f"{steps[0]} goes on from what was written, which this endpoint cannot; say how it can "
            "(--continuation), or compare strategies of whole samples"
        )

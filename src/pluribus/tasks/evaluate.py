"""Score systems on tasks: `evaluate` gives a Report, `evaluate_all` a table of them with a page.

    normalised = score / the specialist's score on the same rows     (1: as good as the specialist)

Equal arguments give equal scores: a seed chooses the rows, the worked examples and the resamplings.
"""

import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pluribus.core.errors import InputError, MismatchError
from pluribus.tasks.systems import Asked, OnStep, System
from pluribus.tasks.task import Examples, Task, digest, sample


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one evaluation measured, and all that is needed to judge and to repeat it."""

    task: str
    system: str
    metric: str
    score: float
    standard_error: float | None
    n: int  # rows scored
    of: int  # rows of the test split
    seed: int
    specialist: float | None = None  # the specialist's score on the same rows
    floor: float | None = None  # the score of always answering the commonest class of these rows
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None  # digest of the system's weights
    data: str | None = None  # digest of the rows scored
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def normalised(self) -> float | None:
        """The score over the specialist's; None without one, or where it scores 0 or less."""
        if self.specialist is None or self.specialist <= 0:
            return None
        return self.score / self.specialist

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "normalised": self.normalised, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Report":
        """Return the report that `to_dict` gave."""
        fields = {key: value for key, value in told.items() if key != "normalised"}
        return cls(**{**fields, "notes": tuple(fields.get("notes", ()))})


@dataclass(frozen=True)
class Reports:
    """Reports of several systems on the same tasks and rows, in the order they were asked for."""

    reports: tuple[Report, ...]

    @property
    def systems(self) -> list[str]:
        """The systems' labels."""
        return list(dict.fromkeys(report.system for report in self.reports))

    @property
    def tasks(self) -> list[str]:
        """The tasks' names."""
        return list(dict.fromkeys(report.task for report in self.reports))

    def get(self, system: str, task: str) -> Report | None:
        """Return one report, or None if that system was not asked."""
        found = (r for r in self.reports if (r.system, r.task) == (system, task))
        return next(found, None)

    def mean(self, system: str) -> tuple[float, float | None]:
        """Return a system's mean score over its tasks, and the standard error of that mean."""
        mine = [report for report in self.reports if report.system == system]
        score = statistics.fmean(report.score for report in mine)
        errors = [report.standard_error for report in mine]
        known = [error for error in errors if error is not None]
        if len(known) < len(errors):
            return score, None
        return score, sum(error**2 for error in known) ** 0.5 / len(mine)

    def mean_normalised(self, system: str) -> float | None:
        """Return a system's mean normalised score over the tasks that have one, None for none."""
        mine = [report.normalised for report in self.reports if report.system == system]
        known = [value for value in mine if value is not None]
        return statistics.fmean(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return all reports and the systems' means as plain values."""
        means = {}
        for system in self.systems:
            score, error = self.mean(system)
            normalised = self.mean_normalised(system)
            means[system] = {"score": score, "standard_error": error, "normalised": normalised}
        return {"means": means, "reports": [report.to_dict() for report in self.reports]}

    def table(self) -> str:
        """Return a table for a terminal: a row a task, a column a system."""
        from pluribus.tasks.tables import table

        return table(self)

    def html(self, title: str = "Evaluation") -> str:
        """Return a page with plots, the table and how it was measured."""
        from pluribus.tasks.tables import page

        return page(self, title)


def evaluate(
    system: System,
    task: Task,
    *,
    limit: int | None = None,
    seed: int = 0,
    specialist: System | Report | float | None = None,
    on_step: OnStep | None = None,
) -> Report:
    """Score one system on a task's test split, or on `limit` rows of it chosen by seed.

    A specialist is a score, a report on the same rows, or a system that is scored first.
    `on_step(task, rows done, rows in all)` is told of progress; nothing is printed. Raises
    InputError for a limit below 1 or a task that the system cannot do, MismatchError for a
    specialist's report on other rows, DataError if the data is not there.
    """
    return _evaluate(system, task, _Rows.of(task, limit, seed), specialist, on_step)


def evaluate_all(
    systems: Sequence[System],
    tasks: Iterable[Task],
    *,
    limit: int | None = None,
    seed: int = 0,
    specialists: Mapping[str, System | Report | float] | None = None,
    on_step: OnStep | None = None,
) -> Reports:
    """Score every system on every task, on the same rows; `specialists` are by a task's name.

    Raises InputError for two systems with one label, or a specialist of no task that is asked.
    """
    labels = [system.label for system in systems]
    if not systems or len(set(labels)) < len(labels):
        raise InputError(f"the systems are labelled {labels}; give one or more, each label once")
    tasks, specialists = list(tasks), dict(specialists or {})
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise InputError(f"the tasks are {names}; give one or more, each once")
    if extra := [name for name in specialists if name not in names]:
        raise InputError(f"a specialist of {extra[0]} is given, but the tasks are {names}")
    found: dict[tuple[str, str], Report] = {}
    for task in tasks:
        rows = _Rows.of(task, limit, seed)
        best = specialists.get(task.name)
        if best is not None and not isinstance(best, Report | float | int):
            best = _evaluate(best, task, rows, None, on_step)
        for system in systems:
            found[system.label, task.name] = _evaluate(system, task, rows, best, on_step)
    order = [(label, name) for label in labels for name in names]
    return Reports(tuple(found[key] for key in order))


@dataclass(frozen=True)
class _Rows:
    """A task's examples, the rows to score and their digest."""

    examples: Examples
    rows: list
    digest: str
    seed: int

    @classmethod
    def of(cls, task: Task, limit: int | None, seed: int) -> "_Rows":
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; it must be at least 1, or None for all rows")
        if seed < 0:
            raise InputError(f"seed is {seed}; it must not be below 0")
        examples = task.load()
        rows = sample(examples.test, limit, seed)
        return cls(examples, rows, digest(rows), seed)


def _evaluate(
    system: System,
    task: Task,
    asked: _Rows,
    specialist: System | Report | float | None,
    on_step: OnStep | None,
) -> Report:
    targets = [row.target for row in asked.rows]
    if specialist is not None and not isinstance(specialist, Report | float | int):
        specialist = _evaluate(specialist, task, asked, None, on_step)
    if isinstance(specialist, Report):
        if (specialist.task, specialist.data) != (task.name, asked.digest):
            raise MismatchError(
                f"the specialist's report is of {specialist.n} rows of {specialist.task}, not of "
                f"these {len(targets)} rows of {task.name}; use the same limit and seed"
            )
        specialist = specialist.score
    began = time.perf_counter()
    question = Asked(task, asked.rows, asked.examples, asked.seed)
    values, notes = system.predict(question, on_step)
    seconds = time.perf_counter() - began
    if len(values) != len(targets):
        raise MismatchError(
            f"{system.label} made {len(values)} predictions for {len(targets)} rows of {task.name}"
        )
    floor = None
    if asked.examples.classes:
        commonest = statistics.mode(targets)
        floor = task.score([commonest] * len(targets), targets)
    return Report(
        task=task.name,
        system=system.label,
        metric=task.metric,
        score=task.score(values, targets),
        standard_error=task.score.standard_error(values, targets, asked.seed),
        n=len(targets),
        of=len(asked.examples.test),
        seed=asked.seed,
        specialist=None if specialist is None else float(specialist),
        floor=floor,
        settings=dict(system.settings),
        weights=system.digest(),
        data=asked.digest,
        seconds=seconds,
        versions=versions(),
        notes=notes,
    )


def versions() -> dict[str, str]:
    """Return the versions of what was at work."""
    from pluribus import __version__

    found = {"pluribus": __version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "transformers", "lm_eval"):
        if (module := sys.modules.get(name)) is not None:
            found[name] = str(getattr(module, "__version__", "unknown"))
    return found

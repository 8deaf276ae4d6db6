"""Preferences between tasks: points of the simplex, checked once, and knobs that make them.

    w = (w_1 .. w_k),  w_i >= 0,  sum_i w_i = 1        {"maths": 0.7, "code": 0.3}

Tasks that a preference leaves out get 0. Sums within 1e-3 of 1 count as rounding and are divided
out, so that what follows is a convex combination; any other sum is refused unless `normalise` is
asked for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from pluribus.core.errors import InputError, listing, nearest

Preference = Mapping[str, float]
SLACK = 1e-3  # how far a sum may be from 1


@runtime_checkable
class Preferring(Protocol):
    """Whatever gives a model for a preference without training: posteriors, or checkpoints."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that a preference can name, in their order."""
        ...

    def mean(self, preference: Preference, *, normalise: bool = False) -> Mapping[str, Any]:
        """Return the one model in the middle of what the preference allows, as named tensors."""
        ...

    def model(self, preference: Preference, *, normalise: bool = False) -> Any:
        """Return the model, or the sampled models, of a preference."""
        ...

    def sweep(
        self, task: str, points: int, rest: Preference | None = None
    ) -> Iterator[tuple[dict[str, float], Mapping[str, Any]]]:
        """Give preferences with a rising share of one task, each with its model."""
        ...


def shares(
    preference: Preference, tasks: Sequence[str], *, normalise: bool = False
) -> tuple[float, ...]:
    """Return one share a task in the order of `tasks`; they sum to 1.

    Raises InputError for an unknown task, a share that is negative or no finite number, shares that
    are all zero, and a sum that is not 1 within 1e-3 (unless `normalise`).
    """
    if not tasks:
        raise InputError("no task has been learned yet, so there is nothing to prefer")
    for name, value in preference.items():
        if name not in tasks:
            raise InputError(
                f"the preference names {name!r}; the tasks are: {listing(tasks, 20)}."
                + nearest(str(name), tasks)
            )
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(f"the share of {name} is {value!r}; give a number from 0 to 1")
        if value < 0:
            raise InputError(
                f"the share of {name} is {value:g}; shares are 0 or more (to forget a task, "
                "subtract its task vector: merge method task_arithmetic with a negative weight)"
            )
    given = [float(preference.get(task, 0.0)) for task in tasks]
    total = math.fsum(given)
    if total == 0:
        raise InputError("all shares of the preference are zero; give one task more than 0")
    if abs(total - 1) > SLACK and not normalise:
        raise InputError(
            f"the shares of the preference sum to {total:g}, not to 1; correct them, or pass "
            "normalise=True (--normalise) to have them divided by their sum"
        )
    return tuple(value / total for value in given)


def prefer(
    task: str, strength: float, tasks: Sequence[str], rest: Preference | None = None
) -> dict[str, float]:
    """Return the preference that gives `strength` to one task and shares out what is left.

    The others get equal parts, or parts in proportion to `rest`. Raises InputError for an unknown
    task, a strength outside [0, 1], and a remainder that no other task can take.
    """
    if task not in tasks:
        raise InputError(
            f"there is no task {task!r}; the tasks are: {listing(tasks, 20)}."
            + nearest(task, tasks)
        )
    if not 0 <= strength <= 1:
        raise InputError(f"strength = {strength!r}: give a number from 0 to 1")
    others = [name for name in tasks if name != task]
    if not others and strength < 1:
        raise InputError(f"{task} is the only task, so its strength can only be 1")
    out = {task: float(strength)}
    if others:
        wanted = {name: 1.0 for name in others}
        if rest is not None:
            wanted = {name: rest.get(name, 0.0) for name in others}
            unknown = {name: value for name, value in rest.items() if name not in tasks}
            wanted |= unknown  # told apart below, with the nearest name
        parts = shares(wanted, others, normalise=True)
        out |= {name: (1 - strength) * part for name, part in zip(others, parts, strict=True)}
    return {name: out[name] for name in tasks}


def sweep(
    task: str, points: int, tasks: Sequence[str], rest: Preference | None = None
) -> list[dict[str, float]]:
    """Return `points` preferences whose share of one task rises evenly from 0 to 1.

    Raises InputError for fewer than 2 points, and what `prefer` raises.
    """
    if points < 2:
        raise InputError(f"points = {points}: a sweep from 0 to 1 has at least 2")
    return [prefer(task, step / (points - 1), tasks, rest) for step in range(points)]


def read(words: Sequence[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Read `TASK=MODEL:SHARE` texts; return models and shares by task.

    The task ends at the first `=`, the share begins after the last `:`. Raises InputError saying
    which part is missing, and for a task named twice.
    """
    models: dict[str, str] = {}
    wanted: dict[str, float] = {}
    for word in words:
        task, equals, rest = word.partition("=")
        model, colon, share = rest.rpartition(":")
        if not (task and equals and model and colon):
            raise InputError(f"{word!r}: write TASK=MODEL:SHARE, as in maths=models/maths:0.7")
        try:
            value = float(share)
        except ValueError:
            raise InputError(
                f"{word!r}: after the last colon comes a share from 0 to 1, not {share!r}"
            ) from None
        if set(task) & set("/\\\0"):
            raise InputError(f"the task {task!r}: a task's name goes into file names; use no slash")
        if task in models:
            raise InputError(f"the task {task} is given twice; give each task one model")
        models[task], wanted[task] = model, value
    return models, wanted

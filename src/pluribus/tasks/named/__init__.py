"""Named tasks: `get("sst2")`, `names()`, groups such as `text14`.

A file here defines `TASKS`, and may define `GROUPS` (name -> names of tasks). Other packages join
through entry points: `name = "module:TASK"` in the group `pluribus.tasks`.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

from pluribus.core.errors import InputError, listing, nearest
from pluribus.tasks.task import Task


@cache
def _known() -> tuple[dict[str, Task], dict[str, tuple[str, ...]]]:
    tasks: dict[str, Task] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{found}")
        tasks |= {task.name: task for task in module.TASKS}
        groups |= getattr(module, "GROUPS", {})
    for point in entry_points(group="pluribus.tasks"):
        tasks[point.name] = point.load()
    return tasks, groups


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(_known()[0])


def groups() -> dict[str, tuple[str, ...]]:
    """Return the groups: names that stand for several tasks."""
    return dict(_known()[1])


def get(name: str) -> Task:
    """Return the task called `name`. Raises InputError with the nearest name."""
    tasks, grouped = _known()
    if name in tasks:
        return tasks[name]
    if name in grouped:
        raise InputError(
            f"'{name}' is a group of {len(grouped[name])} tasks: {listing(grouped[name])}"
        )
    raise InputError(
        f"no task is called '{name}'; there are {listing(names(), 12)} and the groups "
        f"{', '.join(grouped)}.{nearest(name, [*tasks, *grouped])}"
    )


def expand(wanted: Iterable[str]) -> list[Task]:
    """Return the tasks of a list of names and groups, each once, in the order given."""
    grouped = _known()[1]
    flat = [one for name in wanted for one in grouped.get(name, (name,))]
    return [get(name) for name in dict.fromkeys(flat)]

"""Which of several prompts suits a mode: chosen on one half of a task, measured on the other.

    first, second = halves(task)
    mode = pick(CoT(), templates, model, first)
    effect = CoTProbe(model, [Direct(), mode]).measure(second)

To choose and to measure on the same problems would flatter the mode with more prompts.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from pluribus.agents.thinking.effect import arm
from pluribus.agents.thinking.modes import ByStrategy, CoT, Direct, try_all
from pluribus.agents.thinking.tasks import Task
from pluribus.core.errors import InputError
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import Generator

M = TypeVar("M", Direct, CoT, ByStrategy)


def halves(task: Task, seed: int = 0) -> tuple[Task, Task]:
    """Return two tasks with the problems of one, by chance; the first has the odd one.

    Raises InputError if a half has one answer alone.
    """
    order = random.Random(f"halves/{seed}/{task.name}").sample(task.problems, len(task.problems))
    cut = (len(order) + 1) // 2
    return (
        replace(task, problems=tuple(order[:cut])),
        replace(task, problems=tuple(order[cut:])),
    )


def pick(
    mode: M,
    templates: Sequence[str],
    model: Generator,
    task: Task,
    budget: Budget | None = None,
) -> M:
    """Return the mode with the template that gets most problems right, of equals the cheapest.

    Of those that cost the same the first is taken. Raises InputError for no template, or one
    without {question}, before the model is asked.
    """
    if not templates:
        raise InputError("there is no template to pick from; give at least one with {question}")
    ways = [replace(mode, template=one) for one in templates]
    answers = [problem.answer for problem in task.problems]
    told = []
    for place, way in enumerate(ways):
        made = arm(way.name, try_all(way, task.problems, model, budget), answers)
        told.append((-made.accuracy, made.tokens, place))
    return ways[min(told)[2]]

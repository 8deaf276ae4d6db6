"""Passes to learn labels with exceptions, for a mode of a model.

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333. Two modes learn the same lists in the
same orders; they are compared by

    ratio = exp(mean over lists of log(passes of c / passes of d)),  p by flips of the logs' signs
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pluribus.agents.thinking.intervals import bootstrap, flipped
from pluribus.agents.thinking.modes import Mode, choice
from pluribus.core.errors import InputError, MismatchError
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import Generator, Problem
from pluribus.tasks.suites.exceptions import LABELS, MOST, Told, Vehicle, Vehicles, passes, prompt


@dataclass(frozen=True)
class PassesEffect:
    """How many times as many passes one mode needs as another; above 1 it learns more slowly."""

    n: int
    ratio: float
    ci: tuple[float, float]  # 95 %, bootstrap over lists
    p: float
    means: tuple[float, float]  # passes of either mode


def learn(
    mode: Mode,
    model: Generator,
    lists: Sequence[Vehicles],
    *,
    seed: int = 0,
    most: int = MOST,
    budget: Budget | None = None,
) -> list[int]:
    """Return passes for each list, most + 1 where it is never learned. Raises InputError."""
    if not lists:
        raise InputError("there is no list of vehicles to learn; give at least one")
    found = []
    for number, drawn in enumerate(lists):

        def agent(told: Told, vehicle: Vehicle) -> str | None:
            asked = Problem(question=prompt(told, vehicle), extract=choice(LABELS))
            return mode.run(asked, model, budget).answer

        found.append(passes(agent, drawn, seed + number, most))
    return found


def passes_effect(over: Sequence[int], passes: Sequence[int], *, seed: int = 0) -> PassesEffect:
    """Compare passes of two modes on the same lists.

    Raises MismatchError if they are not paired, InputError for none or below 1.
    """
    if len(over) != len(passes):
        raise MismatchError(
            f"there are passes for {len(over)} and {len(passes)} lists; give the same lists"
        )
    if not over or min(*over, *passes) < 1:
        raise InputError("passes are 1 or more, for at least one list; give those of `learn`")
    logs = [math.log(c / d) for d, c in zip(over, passes, strict=True)]
    low, high = bootstrap(logs, seed=seed)
    return PassesEffect(
        n=len(logs),
        ratio=math.exp(sum(logs) / len(logs)),
        ci=(math.exp(low), math.exp(high)),
        p=flipped(logs, seed=seed),
        means=(sum(over) / len(over), sum(passes) / len(passes)),
    )

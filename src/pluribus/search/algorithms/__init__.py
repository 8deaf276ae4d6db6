"""Search algorithms: one a file, found by its name; `run(..., algorithm="evolution")`.

An algorithm is a frozen dataclass of settings. One that tries points one after another has

    generator(objectives, seed) -> pg.DNAGenerator

and one that trains all points at once in a network with shared weights (`shares_weights=True`) has

    search(space, evaluate, session) -> None

which runs its own loop and tells the session what it found, see `pluribus.search.study.Session`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pluribus.core.errors import InputError
from pluribus.core.merger import _checked
from pluribus.core.registry import Registry

FACTS = "__pluribus_algorithm__"
ALGORITHMS = Registry("pluribus.search.algorithms", FACTS, "search algorithm")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Facts:
    """What is known about an algorithm without running it."""

    name: str
    paper: str
    summary: str
    feedback: bool  # whether what it proposes depends on scores
    many: bool  # whether it takes several objectives
    repeats: bool  # whether replaying a history gives the proposals of an uninterrupted run
    shares_weights: bool  # whether it trains all points at once


def algorithm(
    name: str,
    *,
    paper: str = "",
    feedback: bool = True,
    many: bool = False,
    repeats: bool = True,
    shares_weights: bool = False,
) -> Callable[[C], C]:
    """Register an algorithm's facts and make its construction check its settings.

    Goes above `@dataclass(frozen=True, kw_only=True)`, as `merger` does.
    """

    def decorate(cls: C) -> C:
        doc = inspect.getmodule(cls)
        summary = ((doc.__doc__ if doc else None) or cls.__doc__ or "").strip().split("\n")[0]
        facts = Facts(name, paper, summary, feedback, many, repeats, shares_weights)
        setattr(cls, FACTS, facts)
        _checked(cls, name)
        return cls

    return decorate


def facts(what: Any) -> Facts:
    """Return the facts of an algorithm or its class."""
    return getattr(what, FACTS)


def algorithm_of(what: Any) -> Any:
    """Return the algorithm that `what` names: one as it is, or "evolution" with its defaults.

    Raises RecipeError for an unknown name, InputError for anything else.
    """
    if isinstance(what, str):
        return ALGORITHMS[what]()
    if isinstance(what, type) or not hasattr(what, FACTS):
        raise InputError(
            f"algorithm = {what!r}: give a name ({', '.join(ALGORITHMS)}) or one of their objects, "
            "such as Evolution(population_size=20)"
        )
    return what

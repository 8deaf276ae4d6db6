"""Task suites made from a seed, to measure where thinking in words helps and where it hurts.

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333: three kinds of task on which thinking
in words makes people worse (`grammar`, `faces`, `exceptions`), and three controls (`inconsistency`,
`spatial`, `aggregate`). Items are made here, none is the paper's.

    suite("grammar", n=200, seed=0, difficulty="medium") -> [Item(prompt, answer, choices, ...)]

A suite is one file: a frozen dataclass with `make(n, seed, difficulty)` below `@item_suite`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from pluribus.core.errors import InputError, nearest
from pluribus.core.merger import _checked
from pluribus.core.registry import Registry

FACTS = "__pluribus_suite__"
DIFFICULTIES = ("easy", "medium", "hard")  # medium has the paper's sizes
TRAITS = (  # of a task, yes or no: the card of `pluribus.agents.thinking`
    "implicit_pattern",  # learned from examples, without a rule that could be told
    "hard_to_verbalise",  # seen or heard rather than said
    "exceptions_dominate",  # what rules leave over decides
    "symbolic_steps",  # several steps of logic or arithmetic
    "needs_state",  # something must be counted or kept track of
    "long_aggregation",  # many small facts are put together
)
C = TypeVar("C", bound=type)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with its answer. Images in `media` are arrays of shape (r, c), uint8."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    media: tuple[Any, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@runtime_checkable
class Suite(Protocol):
    """Makes items."""

    def make(self, n: int, seed: int, difficulty: str) -> list[Item]:
        """Return n items; the same seed gives the same ones."""
        ...


@dataclass(frozen=True)
class SuiteFacts:
    """What is known about a suite without making it."""

    name: str
    kind: Literal["hurts people", "control"]
    traits: tuple[str, ...]


def item_suite(
    name: str, *, kind: Literal["hurts people", "control"], traits: tuple[str, ...]
) -> Callable[[C], C]:
    """Register a suite's facts and make its construction check its parameters."""

    def decorate(cls: C) -> C:
        setattr(cls, FACTS, SuiteFacts(name, kind, traits))
        _checked(cls, name)
        return cls

    return decorate


SUITES = Registry(__name__, FACTS, "suite")


def facts(name: str) -> SuiteFacts:
    """Return the facts of a suite. Raises RecipeError with the nearest name."""
    return getattr(SUITES[name], FACTS)


def suite(name: str, n: int = 200, seed: int = 0, difficulty: str = "medium") -> list[Item]:
    """Return n items of a suite with its usual parameters.

    Raises RecipeError for a name that is none, InputError for n < 1 or another difficulty.
    """
    return make(SUITES[name](), n, seed, difficulty)


def make(maker: Suite, n: int, seed: int = 0, difficulty: str = "medium") -> list[Item]:
    """Return n items of a suite with parameters of its own. Raises InputError, see `suite`."""
    if n < 1:
        raise InputError(f"{n} items were asked for; give at least 1")
    if difficulty not in DIFFICULTIES:
        raise InputError(
            f"the difficulty is {difficulty!r}; there are {', '.join(DIFFICULTIES)}."
            + nearest(difficulty, DIFFICULTIES)
        )
    return maker.make(n, seed, difficulty)

"""How a budget is spent on one problem: a frozen dataclass with `run`, one file a strategy.

    strategy.run(problem, generator, verifier, budget) -> Scaled

A strategy takes any generator and, if it asks for one, any verifier.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pluribus.core.errors import RecipeError
from pluribus.core.merger import _checked
from pluribus.core.registry import Registry
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import Generator, Problem, Scaled, Verifier

FACTS = "__pluribus_strategy__"
S = TypeVar("S", bound=type)


class Strategy(Protocol):
    """Spends a budget on a problem."""

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """Return the answer, its rivals, the cost and a trace.

        Raises InputError for a verifier that is missing or gives scores outside [0, 1], or a
        generator that cannot go on from a prefix where the strategy goes step by step.
        """
        ...


@dataclass(frozen=True)
class StrategyFacts:
    """What is known about a strategy without running it."""

    name: str
    paper: str
    kind: Literal["parallel", "sequential", "hybrid"]
    verifier: Literal["none", "optional", "required"]
    continues: bool  # whether the generator must go on from a prefix
    pooled: bool  # whether its samples don't depend on each other: a pool serves all its sizes


def strategy(
    name: str,
    *,
    kind: Literal["parallel", "sequential", "hybrid"],
    verifier: Literal["none", "optional", "required"] = "none",
    continues: bool = False,
    pooled: bool = False,
    paper: str = "",
) -> Callable[[S], S]:
    """Register a strategy's facts and make its construction check its parameters.

    Goes above `@dataclass(frozen=True, kw_only=True)`.
    """

    def decorate(cls: S) -> S:
        setattr(cls, FACTS, StrategyFacts(name, paper, kind, verifier, continues, pooled))
        _checked(cls, name)
        return cls

    return decorate


STRATEGIES = Registry(__name__, FACTS, "strategy")


def facts(strategy: Any) -> StrategyFacts:
    """Return the facts of a strategy or its class."""
    return getattr(strategy, FACTS)


def build(settings: str | Mapping[str, Any]) -> Any:
    """Return the strategy that a name, or a mapping such as {"kind": "beam_search"}, describes.

    Raises RecipeError without a known `kind`, InputError for a bad parameter.
    """
    given = {"kind": settings} if isinstance(settings, str) else dict(settings)
    kind = given.pop("kind", None)
    if not isinstance(kind, str):
        raise RecipeError(f"a strategy needs a kind: one of {', '.join(STRATEGIES)}")
    return STRATEGIES[kind](**given)

"""Who judges candidates: one file a verifier, each an object with `score`.

    verifier.score(problem, [step, ...]) -> [score in [0, 1], ...]      one a step, or one in all

A verifier that calls a model has `tokens` and `calls`, which count what it has used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pluribus.core.registry import Registry

FACTS = "__pluribus_verifier__"
V = TypeVar("V", bound=type)


@dataclass(frozen=True)
class VerifierFacts:
    """What is known about a verifier without running it."""

    name: str
    needs: Literal["answer", "tests", "generator", "head", "fused"]  # what it judges by
    paper: str


def verifier(
    name: str, *, needs: Literal["answer", "tests", "generator", "head", "fused"], paper: str = ""
) -> Callable[[V], V]:
    """Register a verifier's facts."""

    def decorate(cls: V) -> V:
        setattr(cls, FACTS, VerifierFacts(name, needs, paper))
        return cls

    return decorate


VERIFIERS = Registry(__name__, FACTS, "verifier")


def facts(verifier: Any) -> VerifierFacts:
    """Return the facts of a verifier or its class."""
    return getattr(verifier, FACTS)

"""Objectives: a frozen dataclass called on outputs and targets, returning one number to minimise.

    loss(outputs: Float["b v"], targets) -> Float[""]

A loss is one file here, named after it. `needs` says what its targets are: nothing, "labels"
(class indices (b,)), "experts" (the logits of each task's own expert, (b, v)) or "guesses"
(probabilities (b, v), see `ufm`). Losses that need no labels never get to see any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pluribus.core.errors import InputError
from pluribus.core.merger import _checked
from pluribus.core.registry import Registry

Needs = Literal["nothing", "labels", "experts", "guesses"]
FACTS = "__pluribus_loss__"
L = TypeVar("L", bound=type)


@dataclass(frozen=True)
class LossFacts:
    """What is known about a loss without running it."""

    name: str
    paper: str
    needs: Needs


def loss(name: str, *, paper: str = "", needs: Needs = "nothing") -> Callable[[L], L]:
    """Register a loss's facts and make its construction check its parameters.

    Goes above `@dataclass(frozen=True, kw_only=True)`.
    """

    def decorate(cls: L) -> L:
        setattr(cls, FACTS, LossFacts(name, paper, needs))
        _checked(cls, name)
        return cls

    return decorate


LOSSES = Registry(__name__, FACTS, "loss")


def needs(what: Any) -> Needs:
    """Return what a loss's targets are; a plain function of the outputs needs nothing."""
    known = getattr(what, FACTS, None)
    return "nothing" if known is None else known.needs


def loss_of(what: Any) -> Callable[..., Any]:
    """Return the loss that a name or an object says. Raises RecipeError, or InputError."""
    if isinstance(what, str):
        return LOSSES.build(what, {})
    if not callable(what):
        raise InputError(f"{what!r} is no loss; give its name ({', '.join(LOSSES)}) or a function")
    return what


def logits_of(outputs: Any) -> Any:
    """Return a classifier's outputs as a (b, v) tensor. Raises InputError for another shape."""
    outputs = getattr(outputs, "logits", outputs)
    if getattr(outputs, "ndim", None) != 2:
        shape = list(outputs.shape) if hasattr(outputs, "shape") else type(outputs).__name__
        raise InputError(
            f"the outputs are {shape}, but this objective takes class scores (inputs, classes); "
            "let `forward` return one row of scores for each input"
        )
    return outputs

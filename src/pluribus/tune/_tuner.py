"""What a tuning method is: a frozen dataclass of settings with `fit(pool, forward, streams)`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pluribus.core.errors import InputError
from pluribus.core.merger import _checked
from pluribus.core.pool import Pool
from pluribus.tune import FACTS

if TYPE_CHECKING:
    from pluribus.tune._fit import Log

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class TunerFacts:
    """What is known about a tuning method without running it."""

    name: str
    paper: str
    summary: str


def tuner_facts(what: Any) -> TunerFacts:
    """Return the facts of a tuning method or its class."""
    return getattr(what, FACTS)


def tuner(name: str, *, paper: str) -> Callable[[T], T]:
    """Register a tuning method's facts and make its construction check its parameters.

    Goes above `@dataclass(frozen=True, kw_only=True)`.
    """

    def decorate(cls: T) -> T:
        doc = inspect.getmodule(cls)
        summary = ((doc.__doc__ if doc else None) or cls.__doc__ or "").strip().split("\n")[0]
        setattr(cls, FACTS, TunerFacts(name, paper, summary))
        _checked(cls, name)
        return cls

    return decorate


def look_at(pool: Pool, forward: Any, log: "Log") -> list[str]:
    """Return the floating tensors that are buffers of the module, and note what is odd.

    Their updates are left out: running statistics are no parameters.
    """
    if pool.base is None:
        raise InputError("coefficients are learned for updates of a base; give a base model")
    for label, expert in pool.experts.items():
        if all(
            expert.source(n).identity == pool.base.source(n).identity
            or expert.source(n).load().tobytes() == pool.base.source(n).load().tobytes()
            for n in pool.names
        ):
            log.warn(f"{label} equals the base: it has no update to scale")
    parameter_names = getattr(forward, "parameter_names", None)
    if parameter_names is None:
        return []
    known = parameter_names()
    names = [name for name in pool.names if pool.base.source(name).spec.kind.is_float]
    buffers = [name for name in names if name not in known]
    if forward.normalises_by_batch():
        log.warn(
            "the model normalises by batch: the base's running statistics are used, which fit no "
            "merged model exactly; measure them anew afterwards (pluribus.renorm)"
        )
    return buffers

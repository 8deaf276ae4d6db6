"""Read a merge method from what a user wrote: an object, a name, a chain, or a mapping."""

from collections.abc import Mapping
from typing import Any

from pluribus.core.errors import RecipeError
from pluribus.core.merger import FACTS
from pluribus.core.registry import MERGERS, STEPS


def method_of(what: Any) -> Any:
    """Return the merger that `what` names.

    `what` is a merger (returned as it is), "ties", "ties(density=0.2) >> lines(beta=0.8)", or
    {"merge_method": ..., "parameters": {...}}. Raises RecipeError otherwise, InputError for a chain
    that combines nothing.
    """
    if hasattr(what, FACTS) and not isinstance(what, type):
        return what
    if isinstance(what, str):
        if what in MERGERS:
            return MERGERS.build(what, {})
        if "(" in what or ">>" in what or what in STEPS:
            from pluribus.core.chain import as_merger

            return as_merger(what)
        return MERGERS.build(what, {})  # raises with the nearest name
    if isinstance(what, Mapping) and "merge_method" in what:
        unknown = set(what) - {"merge_method", "parameters"}
        if unknown:
            raise RecipeError(f"a method is merge_method and parameters, not {sorted(unknown)}")
        method, parameters = what["merge_method"], what.get("parameters") or {}
        if parameters and method in MERGERS:
            return MERGERS.build(method, parameters)
        if parameters:
            raise RecipeError(f"parameters of a chain stand inside it: {method}")
        return method_of(method)
    raise RecipeError(f"{what!r} is not a merge method; give its name, a chain or an object")

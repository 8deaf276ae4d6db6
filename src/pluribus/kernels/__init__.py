"""Fused CPU kernels: the same arithmetic as the readable methods, in one pass over memory.

Each file is named after the method it serves and is found by that name; it defines
`fused(merger, base, experts, *, at, **folded) -> array` on float32 numpy blocks, and may define
`values(merger, fold name, base, experts, *, at, **folded)` for its folds, which returns values, a
`Summed`, or None where the readable form is to do it.
The readable form in `pluribus.merge` stays the oracle, and the contract suite holds the two
together.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def find(name: str, part: str = "fused") -> Callable[..., Any] | None:
    """Return a part of the kernel of the method called `name`, if it has one."""
    if not name.isidentifier():
        return None
    where = f"{__name__}.{name}"
    if importlib.util.find_spec(where) is None:
        return None
    return getattr(importlib.import_module(where), part, None)

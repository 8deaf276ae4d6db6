"""Fused CPU kernels: the same arithmetic as the readable methods, in one pass over memory.

Each file is named after the method it serves and is found by that name. It defines
`fused(merger, base, experts, *, at, out, **folded) -> array` on blocks of float32 or packed
bfloat16 (see `chunks`), which fills `out` if it is given one. It may define `values`, a mapping
from names of the method's folds to `kernel(merger, base, experts, *, at, **folded)`, which returns
the values or, of a fold that sums, a `Summed`.

The readable form in `pluribus.merge` stays the oracle, and tests/kernels holds the two together bit
for bit.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any


@cache
def find(name: str, part: str) -> Any:
    """Return a part of the kernels of the method called `name`, or None."""
    if not name.isidentifier():
        return None
    where = f"{__name__}.{name}"
    if importlib.util.find_spec(where) is None:
        return None
    return getattr(importlib.import_module(where), part, None)

"""Experts in a fraction of their bytes: a store that gives back any expert on demand.

A compressor is one file here, named after it: a frozen dataclass with `fit(base, experts)`. What it
makes is a store: `.tasks`, `.expand(task)` (lazy weights), `.report()`, `.save(folder)`.

    bank = TallMasks(mask_lambda="l1").fit(base, {"math": a, "code": b}, out="bank")
    open_store("bank", base).expand("math").save("math.safetensors")
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pluribus.compress._bank import ExpertBank, Score
from pluribus.compress._store import Store, manifest
from pluribus.compress._twins import TwinStore
from pluribus.compress.emr import Emr
from pluribus.compress.exact import Exact
from pluribus.compress.tall_masks import TallMasks
from pluribus.compress.twin import Twin
from pluribus.core.errors import RecipeError
from pluribus.core.registry import Registry

COMPRESSORS = Registry("pluribus.compress", "__pluribus_compressor__", "compressor")

__all__ = [
    "COMPRESSORS",
    "Emr",
    "Exact",
    "ExpertBank",
    "Store",
    "TallMasks",
    "Twin",
    "TwinStore",
    "build",
    "open_store",
]


def build(
    what: Any,
    base: Any,
    experts: Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    score: Score | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Store:
    """Compress experts into the folder `out` and return the store opened from it.

    `what` is a compressor, its name, or `{"method": name, "parameters": {...}}`. `score(task,
    weights)` is what a compressor that validates maximises; `options` go to the merge driver.
    Raises RecipeError, InputError, MismatchError or OutputError before anything is written.
    """
    return compressor(what).fit(base, experts, score=score, out=out, overwrite=overwrite, **options)


def compressor(what: Any) -> Any:
    """Return the compressor that `what` names. Raises RecipeError for an unknown one."""
    if isinstance(what, str):
        what = {"method": what}
    if not isinstance(what, Mapping):
        if hasattr(what, "__pluribus_compressor__") and not isinstance(what, type):
            return what
        raise RecipeError(f"{what!r} is not a compressor; there are: {', '.join(COMPRESSORS)}")
    unknown = set(what) - {"method", "parameters"}
    if unknown or "method" not in what:
        raise RecipeError(f"a compressor is method and parameters, not {sorted(what)}")
    parameters = dict(what.get("parameters") or {})
    cls = COMPRESSORS[what["method"]]
    if "lambda" in parameters:
        parameters["mask_lambda"] = parameters.pop("lambda")
    return cls(**parameters)


def open_store(
    folder: str | os.PathLike[str], base: Any = None, *, verify: bool | None = None
) -> Store:
    """Open a store that was saved; nothing is read but headers.

    `base` is the base model where the store needs one (default: where it lay when the store was
    made). `verify=None` reads its bytes only if the base is not the very file it was; True always,
    False never. Raises MismatchError if it is another base, MissingError or FormatError.
    """
    table = manifest(Path(folder))
    kind = {"bank": ExpertBank, "twins": TwinStore}[table["kind"]]
    return kind.open(folder, base, verify=verify)

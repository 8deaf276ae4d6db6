"""Out of many, one: merge, compress and compare fine-tuned models.

    from pluribus import Pool, merge
    merge(Pool("base/", {"math": "math/", "code": "code/"}), "ties(density=0.2)", "merged/")

Names are imported when they are first used, so `import pluribus` costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pluribus.core.chain import parse as chain
    from pluribus.core.pool import Pool
    from pluribus.core.weights import Weights
    from pluribus.engine.driver import Options, merge, merge_tensors
    from pluribus.interpolate import interpolate, path
    from pluribus.scale import search_scale

_WHERE = {
    "Options": "pluribus.engine.driver:Options",
    "Pool": "pluribus.core.pool:Pool",
    "Weights": "pluribus.core.weights:Weights",
    "chain": "pluribus.core.chain:parse",
    "merge_tensors": "pluribus.engine.driver:merge_tensors",
    "path": "pluribus.interpolate:path",
    "search_scale": "pluribus.scale:search_scale",
}

__all__ = [
    "Options",
    "Pool",
    "Weights",
    "__version__",
    "chain",
    "interpolate",
    "merge",
    "merge_tensors",
    "path",
    "search_scale",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("merge", "interpolate"):  # modules that are called
        return import_module(f"pluribus.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'pluribus' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Learned composition: let a little data, mostly unlabelled, choose how much of each expert to add.

    from pluribus import Pool
    from pluribus.tune import AdaMerging, ModuleForward

    pool = Pool(base, {"mnist": a, "signs": b})
    tuned = AdaMerging(steps=200).fit(pool, ModuleForward(net, heads), {"mnist": x, "signs": y})
    tuned.save("merged/")  # the model, its coefficients, and a recipe that replays them

A method is one file here, named after it.
"""

from typing import TYPE_CHECKING, Any

from pluribus.core.registry import Registry

FACTS = "__pluribus_tuner__"
TUNERS = Registry(__name__, FACTS, "tuning method")

if TYPE_CHECKING:
    from pluribus.tune._adapters import LpPlusPlus, Tip
    from pluribus.tune._blend import Blend
    from pluribus.tune._examples import Examples
    from pluribus.tune._linear import linear_scores
    from pluribus.tune._mask import ConcreteMask
    from pluribus.tune._model import ModuleForward
    from pluribus.tune._result import Tuned
    from pluribus.tune.adamerging import AdaMerging
    from pluribus.tune.atlas import Atlas
    from pluribus.tune.concrete import Concrete

_WHERE = {
    "AdaMerging": "adamerging",
    "Atlas": "atlas",
    "Blend": "_blend",
    "Concrete": "concrete",
    "ConcreteMask": "_mask",
    "Examples": "_examples",
    "LpPlusPlus": "_adapters",
    "ModuleForward": "_model",
    "Tip": "_adapters",
    "Tuned": "_result",
    "linear_scores": "_linear",
}
__all__ = [
    "TUNERS",
    "AdaMerging",
    "Atlas",
    "Blend",
    "Concrete",
    "ConcreteMask",
    "Examples",
    "LpPlusPlus",
    "ModuleForward",
    "Tip",
    "Tuned",
    "linear_scores",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'pluribus.tune' has no attribute {name!r}")
    return getattr(import_module(f"pluribus.tune.{_WHERE[name]}"), name)

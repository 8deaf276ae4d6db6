"""Composites that are routed per input: a shared base, small parts, and a router.

    routed = route.from_checkpoints(module, base, {"math": math, "code": code}, density=0.1)
    report = route.fit_router(routed, {"math": inputs, "code": inputs})
    routed(x)                       # each row through its own mixture
    routed.save("composite/")

A composite is a module again: it moves, saves, and generates if its base does.
"""

from pluribus.route.build import from_adapters, from_checkpoints, from_store
from pluribus.route.export import to_peft
from pluribus.route.fit import fit_router
from pluribus.route.parts import Bottleneck, Dense, LowRank, Masked, Scaled
from pluribus.route.routed import Routed
from pluribus.route.router import Gate, Router, RouterReport, auroc, strangeness

__all__ = [
    "Bottleneck",
    "Dense",
    "Gate",
    "LowRank",
    "Masked",
    "Routed",
    "Router",
    "RouterReport",
    "Scaled",
    "auroc",
    "fit_router",
    "from_adapters",
    "from_checkpoints",
    "from_store",
    "strangeness",
    "to_peft",
]

"""A pool in a few numbers, for advice that was measured on other pools: `features(model)`.

All come from the tally of the whole model, so they cost nothing beyond the two passes.
"""

import math

import numpy as np

from pluribus.inspect.tally import Tally, pairs

NAMES = (
    "experts",  # log2 of their number
    "cosine",  # mean over pairs of task vectors
    "ratio",  # log10 of the mean length of task vectors over the base's
    "uneven",  # log2 of the longest task vector over the shortest
    "even",  # effective density, mean over experts
    "crowded",  # log2 of the overlap of supports over that of independent ones
    "opposed",  # share of opposite signs where supports meet, mean over pairs
    "selfish",  # share of parameters in exactly one TALL mask
    "catastrophic",  # share in none
)


def features(model: Tally, density: float) -> dict[str, float] | None:
    """Return the numbers of a pool by name; `density` is that of the tally's supports.

    None where they mean nothing: fewer than two experts that differ from the base, or no base.
    """
    moved = model.norm > 0
    if moved.sum() < 2 or not model.base_square:
        return None
    norms = model.norm[moved]
    overlap = float(pairs(model.overlap).mean())
    opposed = pairs(model.kept_conflict)
    return {
        "experts": math.log2(norms.size),
        "cosine": float(pairs(model.cosine).mean()),
        "ratio": math.log10(float(model.ratio[moved].mean())),
        "uneven": math.log2(float(norms.max() / norms.min())),
        "even": float(np.nanmean(model.density)),
        "crowded": math.log2(max(overlap, 1e-4) * (2 - density) / density),
        "opposed": float(opposed.mean()) if opposed.size else 0.5,
        "selfish": model.selfish,
        "catastrophic": model.catastrophic,
    }

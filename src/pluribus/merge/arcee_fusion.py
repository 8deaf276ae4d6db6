"""Arcee Fusion: take over the updates whose importance stands out in their tensor.

Arcee, 2025, https://arcee.ai; mergekit `arcee_fusion`.

    p, q   = softmax of the expert's and the base's row, plus 1e-8            (r, c)
    kl     = sum over a row of p log(p / q)                                   (r, 1)
    score  = |theta_1 - theta_0| * kl                                         (r, c)
    cut    = median + 1.5 (upper - lower quartile) of the tensor's scores
    theta  = theta_1 where score >= cut, else theta_0                         (r, c)

Rows run along the last axis. A row of one element has kl 0; in a tensor of nothing else (scores all
0) the expert is taken whole, as in mergekit.

Deviates from mergekit: quartiles are exact (there estimated from a random million elements, so that
results differ from run to run); kl is computed in float64, and its rounding below zero counts as 0.
Elements within float32 rounding of the cut may fall differently. Two passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float, namespace
from pluribus.core.merger import Stage, merger
from pluribus.core.order import Order, Ranked


@merger("arcee_fusion", grain="row", experts=(1, 1))
@dataclass(frozen=True, kw_only=True)
class ArceeFusion:
    """Expert where important, base elsewhere."""

    def folds(self) -> Sequence[Stage]:
        """Ask for the quartiles of the scores."""
        return [{"quartiles": Order(of=importance, ranks=_quartiles)}]

    def __call__(
        self, base: Float[Array, "r c"], experts: Float[Array, "1 r c"], *, quartiles: Ranked
    ) -> Float[Array, "r c"]:
        """Merge some rows."""
        low, median, high = quartiles.values[0]
        cut = float(median + quartiles.values.dtype.type(1.5) * (high - low))
        return base + (experts[0] - base) * (importance(base, experts)[0] >= cut)


def importance(base: Array, experts: Array) -> Array:
    """Size of each update times the divergence of its row, (1, r, c)."""
    xp = namespace(base)

    def softmax(x: Array) -> Array:
        x = xp.astype(x, xp.float64)
        x = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
        return x / xp.sum(x, axis=-1, keepdims=True) + 1e-8

    p, q = softmax(experts[0]), softmax(base)
    kl = xp.clip(xp.sum(p * xp.log(p / q), axis=-1, keepdims=True), min=0.0)
    return abs(experts - base) * xp.astype(kl, base.dtype)


def _quartiles(size: int, rows: int) -> np.ndarray:
    """Ranks from the largest of the lower quartile, the median and the upper quartile."""
    last = max(size - 1, 0)
    return np.array([[size - k * last // 4 for k in (1, 2, 3)]] * rows).reshape(-1, 3)

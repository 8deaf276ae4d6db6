"""Model Stock: move from the base towards the experts' average as far as their updates agree.

Jang et al., ECCV 2024, https://arxiv.org/abs/2403.19522, equation 5; mergekit `model_stock`.

    c      = mean over pairs of cos(theta_i - theta_0, theta_j - theta_0)
    s      = t c / (1 + (t - 1) c),                          t experts
    theta  = theta_0 + s * mean_t (theta_t - theta_0)        (n,)

The cosine is that of a tensor ("layer-wise" in the paper), or with `filter_wise` of each vector
along the last axis, as in mergekit. Where |1 + (t - 1) c| < 1e-6 the updates oppose each other and
the base stays. As in mergekit a product of two norms counts as at least 1e-6, so that updates
shorter than about 1e-3 in all are treated as less alike than they are.

Nothing to choose. Two passes; one with `filter_wise`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pluribus.core.arrays import Array, Float, namespace
from pluribus.core.fold import Gram, deltas
from pluribus.core.merger import Grain, Stage, merger
from pluribus.core.sparse import add_up


@merger("model_stock", paper="arXiv:2403.19522", experts=(2, None))
@dataclass(frozen=True, kw_only=True)
class ModelStock:
    """Average, drawn towards the base by the experts' disagreement."""

    filter_wise: bool = False  # one cosine for each vector along the last axis

    @property
    def grain(self) -> Grain:
        """Whole rows where each has its own cosine."""
        return "row" if self.filter_wise else "element"

    def folds(self) -> Sequence[Stage]:
        """Ask for the updates' inner products."""
        return [] if self.filter_wise else [{"gram": Gram(of=deltas)}]

    def __call__(
        self,
        base: Float[Array, "..."],
        experts: Float[Array, "t ..."],
        *,
        gram: np.ndarray | None = None,
    ) -> Float[Array, "..."]:
        """Merge one block."""
        count = experts.shape[0]
        update = add_up(experts - base) * (1 / count)
        if gram is not None:
            return base + update * self.share(gram)
        xp = namespace(experts)
        tau = xp.astype(experts - base, xp.float64)
        shares = _shares(lambda i, j: xp.sum(tau[i] * tau[j], axis=-1, keepdims=True), count, xp)
        shares = xp.astype(shares, experts.dtype)
        return base + update * shares

    def share(self, gram: np.ndarray) -> float:
        """Return how far to go from the base to the experts' average."""
        return float(_shares(lambda i, j: gram[i, j], gram.shape[0], np))

    @property
    def fusible(self) -> bool:
        """Whether one cosine holds for the whole tensor."""
        return not self.filter_wise


def _shares(dot: Callable[[int, int], Any], count: int, xp: Any) -> Any:
    """Return how far to go from the base, by inner products `dot(i, j)` of the updates."""
    norms = [xp.sqrt(dot(i, i)) for i in range(count)]
    total = 0.0
    for i in range(count):
        for j in range(i + 1, count):
            size = norms[i] * norms[j]
            total = total + xp.clip(dot(i, j) / xp.where(size > 1e-6, size, 1e-6), -1.0, 1.0)
    cos = total / (count * (count - 1) / 2)
    divisor = 1 + (count - 1) * cos
    singular = abs(divisor) < 1e-6
    return xp.where(singular, 0.0, count * cos / xp.where(singular, 1.0, divisor))

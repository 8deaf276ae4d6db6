"""RAM+ for single tensors: as `ram`, with more weight to what one expert changed alone.

https://arxiv.org/abs/2601.13572; mergekit `ramplus_tl` ("tensor-local").

    touched_t = |theta_t - theta_0| > epsilon                                          (t, n)
    rho_t     = (elements that t and others touched) / (elements that t alone touched)
    theta     = ram, with the updates of t alone times 1 + r min(rho_t, alpha)         (n,)

The more an expert shares with others in a tensor, and so loses by averaging, the more its own part
gains. Two passes: the counts, then the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.fold import Sum
from pluribus.core.merger import NonNegative, Stage, merger
from pluribus.core.sparse import add_up
from pluribus.merge.ram import shared_mean


@merger("ramplus_tl", paper="arXiv:2601.13572")
@dataclass(frozen=True, kw_only=True)
class RamPlusTl:
    """Mean over the experts that changed an element, unique changes strengthened."""

    r: NonNegative = 0.1
    alpha: NonNegative = 0.2  # largest ratio that counts
    epsilon: NonNegative = 1e-5  # a change up to this is none

    def folds(self) -> Sequence[Stage]:
        """Ask for how many elements each expert touches, and how many it alone."""
        return [{"touched": Sum(of=self._touched), "alone": Sum(of=self._alone)}]

    def _touched(self, base: Array, experts: Array) -> Array:
        touched = abs(experts - base) > self.epsilon
        return namespace(experts).astype(touched, experts.dtype)

    def _alone(self, base: Array, experts: Array) -> Array:
        touched = self._touched(base, experts)
        return touched * (add_up(touched) == 1)

    def __call__(
        self,
        base: Float[Array, " n"],
        experts: Float[Array, "t n"],
        *,
        touched: np.ndarray,
        alone: np.ndarray,
    ) -> Float[Array, " n"]:
        """Merge one block."""
        ratio = np.minimum((touched - alone) / np.maximum(alone, 1e-9), self.alpha)
        gain = column(tuple((self.r * ratio).tolist()), experts)
        mask = self._touched(base, experts)
        mine = self._alone(base, experts)
        return base + add_up(shared_mean(experts - base, mask) * (1 + gain * mine))

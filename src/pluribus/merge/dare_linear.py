"""DARE: drop updates at random, rescale the rest, add the weighted sum.

Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099, section 3; mergekit `dare_linear`.

    m_t    ~ Bernoulli(density), one draw an element                       (t, n)
    tau_t  = f_t m_t (theta_t - theta_0)                                   (t, n)
    theta  = theta_0 + scale * sum_t w_t tau_t                             (n,)

`rescale_by="1/p"` is the paper's f_t = 1 / density: the expected update stays. `"l1"` is mergekit's
f_t = |delta_t|_1 / |m_t delta_t|_1 of each tensor; a norm below 1e-7 is left as it is. Without
`rescale` f_t is 1.

Deviates from mergekit in the numbers drawn (seed, tensor name, expert and element decide them, not
the order of work), and normalised weights that sum to zero are an error. One pass with "1/p", two
with "l1".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pluribus.core.arrays import Array, Float, column
from pluribus.core.fold import Sum, magnitudes
from pluribus.core.merger import At, FractionPerExpert, PerExpert, Stage, merger
from pluribus.core.sparse import combine, drawn, l1_factors

RescaleBy = Literal["l1", "1/p"]


@merger("dare_linear", paper="arXiv:2311.03099", random=True)
@dataclass(frozen=True, kw_only=True)
class DareLinear:
    """Drop at random, rescale, add."""

    density: FractionPerExpert = 1.0  # chance of an element to stay: 1 - p in the paper
    weight: PerExpert = 1.0
    scale: float = 1.0
    normalize: bool = False
    rescale: bool = True
    rescale_by: RescaleBy = "l1"
    int8_mask: bool = False  # mergekit's memory switch; read and ignored

    def folds(self) -> Sequence[Stage]:
        """Ask for the L1 norms before and after dropping, if they are to be equal."""
        if not self.rescale or self.rescale_by != "l1":
            return []
        return [{"before": Sum(of=magnitudes), "after": Sum(of=self._survivors)}]

    def _survivors(self, base: Array, experts: Array, *, at: At) -> Array:
        tau = abs(experts - base)
        return tau * drawn(self.density, tau, at)

    def dropped(
        self,
        base: Array,
        experts: Array,
        at: At,
        before: np.ndarray | None,
        after: np.ndarray | None,
    ) -> Array:
        """Return the rescaled task vectors with their gaps, (t, n)."""
        tau = experts - base
        tau = tau * drawn(self.density, tau, at)
        if before is not None and after is not None:
            return tau * column(l1_factors(before, after), tau)
        return tau / column(self.density, tau) if self.rescale else tau

    def __call__(
        self,
        base: Float[Array, " n"],
        experts: Float[Array, "t n"],
        *,
        at: At,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
    ) -> Float[Array, " n"]:
        """Merge one block. Raises InputError if normalised weights sum to zero."""
        tau = self.dropped(base, experts, at, before, after)
        return combine(base, tau, self.weight, scale=self.scale, normalize=self.normalize)

"""DARE with TIES' vote: drop updates at random, elect a sign, add up what agrees.

Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099, and Yadav et al., NeurIPS 2023,
https://arxiv.org/abs/2306.01708; mergekit `dare_ties`.

    tau_t  = w_t * the dropped and rescaled task vector of `dare_linear`             (t, n)
    gamma  = sign(sum_t tau_t), + where it cancels                                   (n,)
    theta  = theta_0 + scale * sum over {t : sign(tau_t) = gamma} of tau_t           (n,)

`normalize` divides by the weights of the agreeing experts, coordinate by coordinate.

Deviates from mergekit as `dare_linear` does, and negative weights with `normalize` are an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import At, FractionPerExpert, PerExpert, Stage, merger
from pluribus.core.sparse import combine, refuse_negative
from pluribus.merge.dare_linear import DareLinear, RescaleBy


@merger("dare_ties", paper="arXiv:2311.03099", random=True)
@dataclass(frozen=True, kw_only=True)
class DareTies:
    """Drop at random, rescale, elect, add."""

    density: FractionPerExpert = 1.0  # chance of an element to stay
    weight: PerExpert = 1.0
    scale: float = 1.0
    normalize: bool = False  # divide by the weights of the agreeing experts
    rescale: bool = True
    rescale_by: RescaleBy = "l1"
    int8_mask: bool = False  # mergekit's memory switch; read and ignored

    def check(self) -> None:
        """Raise InputError for weights that make the divisor cross zero."""
        if self.normalize:
            refuse_negative("dare_ties", self.weight)

    @property
    def _drop(self) -> DareLinear:
        return DareLinear(density=self.density, rescale=self.rescale, rescale_by=self.rescale_by)

    def folds(self) -> Sequence[Stage]:
        """Ask for what dropping needs."""
        return self._drop.folds()

    def __call__(
        self,
        base: Float[Array, " n"],
        experts: Float[Array, "t n"],
        *,
        at: At,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
    ) -> Float[Array, " n"]:
        """Merge one block."""
        tau = self._drop.dropped(base, experts, at, before, after)
        return combine(
            base, tau, self.weight, scale=self.scale, normalize=self.normalize, vote=True
        )

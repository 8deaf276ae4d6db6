"""Model Breadcrumbs with TIES' vote: keep a band of magnitudes, elect a sign, add what agrees.

Davari and Belilovsky, ECCV 2024, https://arxiv.org/abs/2312.06795, and Yadav et al., NeurIPS 2023,
https://arxiv.org/abs/2306.01708; mergekit `breadcrumbs_ties`.

    tau_t  = w_t * the band of `breadcrumbs`                                            (t, n)
    gamma  = sign(sum_t tau_t), + where it cancels                                      (n,)
    theta  = theta_0 + scale * sum over {t : sign(tau_t) = gamma} of tau_t              (n,)

`normalize` divides by the weights of the agreeing experts, coordinate by coordinate.

Deviates from mergekit as `breadcrumbs` does, and negative weights with `normalize` are an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import (
    At,
    FractionPerExpert,
    Grain,
    PerExpert,
    SharePerExpert,
    Stage,
    merger,
)
from pluribus.core.order import Selection
from pluribus.core.sparse import combine, refuse_negative
from pluribus.merge.breadcrumbs import Breadcrumbs, Order, Within, check_band, grain_of


@merger("breadcrumbs_ties", paper="arXiv:2312.06795")
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies:
    """Keep a band of magnitudes, elect, add."""

    density: FractionPerExpert = 1.0  # share of updates that stay
    gamma: SharePerExpert = 0.01  # share dropped at the top
    weight: PerExpert = 1.0
    scale: float = 1.0
    normalize: bool = False  # divide by the weights of the agreeing experts
    scope: Within = "tensor"
    order: Order = "outlier_first"
    official: bool = False  # rows of conv kernels as in the authors' code
    rescale: bool = False  # restore each tensor's L1 norm
    int8_mask: bool = False  # mergekit's memory switch; read and ignored

    def check(self) -> None:
        """Raise InputError for shares that can't both be had, or a divisor that may cross zero."""
        check_band("breadcrumbs_ties", self.density, self.gamma)
        if self.normalize:
            refuse_negative("breadcrumbs_ties", self.weight)

    @property
    def _band(self) -> Breadcrumbs:
        return Breadcrumbs(
            density=self.density,
            gamma=self.gamma,
            scope=self.scope,
            order=self.order,
            official=self.official,
            rescale=self.rescale,
        )

    @property
    def grain(self) -> Grain:
        """Whole rows where ranks run over rows."""
        return grain_of(self.scope, self.official)

    @property
    def fusible(self) -> bool:
        """Whether the kernel does this scope: it sorts no rows."""
        return self.scope != "row"

    def folds(self) -> Sequence[Stage]:
        """Ask for what the band needs."""
        return self._band.folds()

    def __call__(
        self,
        base: Float[Array, "..."],
        experts: Float[Array, "t ..."],
        *,
        at: At,
        ends: Selection | None = None,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
    ) -> Float[Array, "..."]:
        """Merge one block."""
        tau = self._band.middle(base, experts, at, ends, before, after)
        return combine(
            base, tau, self.weight, scale=self.scale, normalize=self.normalize, vote=True
        )

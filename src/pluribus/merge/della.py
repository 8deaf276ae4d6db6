"""DELLA with TIES' vote: drop small updates more often, elect a sign, average what agrees.

Deep et al., 2024, https://arxiv.org/abs/2406.11617, section 3; mergekit `della`.

    tau_t  = w_t * the dropped and rescaled task vector of `della_linear`              (t, r, c)
    gamma  = sign(sum_t tau_t), + where it cancels                                     (r, c)
    theta  = theta_0 + scale * sum over {t : sign(tau_t) = gamma} of tau_t / their w_t (r, c)

The paper's drop, elect, fuse. Without `normalize` the agreeing updates are added up.

Deviates from mergekit as `della_linear` does, and negative weights with `normalize` are an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import At, FractionPerExpert, PerExpert, SharePerExpert, Stage, merger
from pluribus.core.sparse import combine, refuse_negative
from pluribus.merge.dare_linear import RescaleBy
from pluribus.merge.della_linear import DellaLinear, check_chances


@merger("della", paper="arXiv:2406.11617", grain="row", random=True)
@dataclass(frozen=True, kw_only=True)
class Della:
    """Drop by rank, rescale, elect, average."""

    density: FractionPerExpert = 1.0  # mean chance of an element to stay
    epsilon: SharePerExpert = 0.15  # how far the chance differs from it at both ends of a row
    weight: PerExpert = 1.0
    scale: float = 1.0
    normalize: bool = True  # divide by the weights of the agreeing experts
    rescale: bool = True
    rescale_by: RescaleBy = "l1"
    int8_mask: bool = False  # mergekit's memory switch; read and ignored

    def check(self) -> None:
        """Raise InputError for chances that leave (0, 1), or a divisor that may cross zero."""
        check_chances("della", self.density, self.epsilon)
        if self.normalize:
            refuse_negative("della", self.weight)

    @property
    def _drop(self) -> DellaLinear:
        return DellaLinear(
            density=self.density,
            epsilon=self.epsilon,
            rescale=self.rescale,
            rescale_by=self.rescale_by,
        )

    def folds(self) -> Sequence[Stage]:
        """Ask for what dropping needs."""
        return self._drop.folds()

    def __call__(
        self,
        base: Float[Array, "r c"],
        experts: Float[Array, "t r c"],
        *,
        at: At,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
    ) -> Float[Array, "r c"]:
        """Merge some rows."""
        tau = self._drop.dropped(base, experts, at, before, after)
        return combine(
            base, tau, self.weight, scale=self.scale, normalize=self.normalize, vote=True
        )

"""DELLA: drop small updates more often than large ones, rescale the rest, add the weighted sum.

Deep et al., 2024, https://arxiv.org/abs/2406.11617, section 3 (MagPrune); mergekit `della_linear`.

    p_t    = density + epsilon (2 rank - 1), rank of |delta_t| in its row from 0 to 1   (t, r, c)
    m_t    ~ Bernoulli(p_t)                                                             (t, r, c)
    tau_t  = f_t m_t delta_t,    delta_t = theta_t - theta_0                            (t, r, c)
    theta  = theta_0 + scale * sum_t w_t tau_t                                          (r, c)

`rescale_by="1/p"` is the paper's f_t = 1 / p_t, element by element; `"l1"` is mergekit's, one
factor for each tensor that keeps its L1 norm. A row is the last axis; a vector is one row. An
expert with density 1 is left whole.

Deviates from mergekit: equal magnitudes are ranked by place; rows of one element stay with chance
`density` (there 0/0 stops the merge); tensors of three and more axes are ranked along the last
(there along the second); the numbers drawn, and zero weights, as in `dare_linear`. Two passes with
"l1", each sorting every row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float, column
from pluribus.core.errors import InputError
from pluribus.core.fold import Sum, magnitudes
from pluribus.core.merger import At, FractionPerExpert, PerExpert, SharePerExpert, Stage, merger
from pluribus.core.sparse import chances_by_rank, combine, drawn, l1_factors
from pluribus.merge.dare_linear import RescaleBy


@merger("della_linear", paper="arXiv:2406.11617", grain="row", random=True)
@dataclass(frozen=True, kw_only=True)
class DellaLinear:
    """Drop by rank, rescale, add."""

    density: FractionPerExpert = 1.0  # mean chance of an element to stay
    epsilon: SharePerExpert = 0.15  # how far the chance differs from it at both ends of a row
    weight: PerExpert = 1.0
    scale: float = 1.0
    normalize: bool = False
    rescale: bool = True
    rescale_by: RescaleBy = "l1"
    int8_mask: bool = False  # mergekit's memory switch; read and ignored

    def check(self) -> None:
        """Raise InputError for chances that leave (0, 1)."""
        check_chances("della_linear", self.density, self.epsilon)

    def folds(self) -> Sequence[Stage]:
        """Ask for the L1 norms before and after dropping, if they are to be equal."""
        if not self.rescale or self.rescale_by != "l1":
            return []
        return [{"before": Sum(of=magnitudes), "after": Sum(of=self._survivors)}]

    def _survivors(self, base: Array, experts: Array, *, at: At) -> Array:
        sizes = abs(experts - base)
        return sizes * drawn(chances_by_rank(sizes, self.density, self.epsilon), sizes, at)

    def dropped(
        self,
        base: Array,
        experts: Array,
        at: At,
        before: np.ndarray | None,
        after: np.ndarray | None,
    ) -> Array:
        """Return the rescaled task vectors with their gaps, (t, r, c)."""
        tau = experts - base
        chances = chances_by_rank(abs(tau), self.density, self.epsilon)
        tau = tau * drawn(chances, tau, at)
        if before is not None and after is not None:
            return tau * column(l1_factors(before, after), tau)
        return tau / chances if self.rescale else tau

    def __call__(
        self,
        base: Float[Array, "r c"],
        experts: Float[Array, "t r c"],
        *,
        at: At,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
    ) -> Float[Array, "r c"]:
        """Merge some rows. Raises InputError if normalised weights sum to zero."""
        tau = self.dropped(base, experts, at, before, after)
        return combine(base, tau, self.weight, scale=self.scale, normalize=self.normalize)


def check_chances(
    name: str, density: float | tuple[float, ...], epsilon: float | tuple[float, ...]
) -> None:
    """Raise InputError unless density ± epsilon lies inside (0, 1), or density is 1."""
    count = max(len(v) if isinstance(v, tuple) else 1 for v in (density, epsilon))
    for d, e in zip(_spread(density, count), _spread(epsilon, count), strict=False):
        if d < 1 and not (d - e > 0 and d + e < 1):
            raise InputError(
                f"{name}: density = {d} and epsilon = {e}: chances from density - epsilon to "
                f"density + epsilon must lie between 0 and 1; try epsilon below "
                f"{min(d, 1 - d):.3g}, or density 1"
            )


def _spread(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * count

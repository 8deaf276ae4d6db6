"""Model Breadcrumbs: drop the largest updates as outliers and the smallest as noise, add the rest.

Davari and Belilovsky, ECCV 2024, https://arxiv.org/abs/2312.06795, section 3; mergekit
`breadcrumbs`.

    tau_t  = theta_t - theta_0 where its size ranks g + 1 ... g + d, else 0             (t, n)
             g = int(gamma n), d = int(density n), rank 1 is the largest
    theta  = theta_0 + scale * sum_t w_t tau_t                                          (n,)

`density` is the share that stays (`keep` here and there, 1 - beta in the paper), `gamma` the share
of the largest that go (`outlier`; 1 - gamma in the paper, whose text counts percentiles). Ranks
run over a tensor (paper, mergekit), the whole `"model"`, or a `"row"` (the authors' code: rows of
the last axis with `official`; else a conv kernel's row is all that feeds one output channel, so
that rows are not just three elements long). `order="keep_first"` drops outliers from what the
density leaves, instead of before. A density of 1 keeps everything, outliers too, as in mergekit.
Where int(density n) = 0 an expert adds nothing, also as there.

The authors' defaults: weight 0.3, density 0.15, gamma 0.006.

Deviates from mergekit: equal magnitudes by place; density + gamma > 1 is an error (there gamma
shrinks silently); normalised weights that sum to zero are an error. One pass more than
`task_arithmetic` for most tensors; scope "row" sorts rows in the same pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pluribus.core.arrays import Array, Float, column
from pluribus.core.errors import InputError
from pluribus.core.fold import Sum, magnitudes
from pluribus.core.merger import (
    At,
    FractionPerExpert,
    Grain,
    PerExpert,
    SharePerExpert,
    Stage,
    merger,
)
from pluribus.core.order import Selection, TopK
from pluribus.core.sparse import band, combine, l1_factors, top_of_rows

Within = Literal["tensor", "row", "model"]
Order = Literal["outlier_first", "keep_first"]


@merger("breadcrumbs", paper="arXiv:2312.06795")
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs:
    """Keep a band of magnitudes, add."""

    density: FractionPerExpert = 1.0  # share of updates that stay
    gamma: SharePerExpert = 0.01  # share dropped at the top
    weight: PerExpert = 1.0
    scale: float = 1.0
    normalize: bool = False
    scope: Within = "tensor"
    order: Order = "outlier_first"
    official: bool = False  # rows of conv kernels as in the authors' code
    rescale: bool = False  # restore each tensor's L1 norm
    int8_mask: bool = False  # mergekit's memory switch; read and ignored

    def check(self) -> None:
        """Raise InputError for shares that can't both be had."""
        check_band("breadcrumbs", self.density, self.gamma)

    @property
    def grain(self) -> Grain:
        """Whole rows where ranks run over rows."""
        return grain_of(self.scope, self.official)

    @property
    def fusible(self) -> bool:
        """Whether the kernel does this scope: it sorts no rows."""
        return self.scope != "row"

    def folds(self) -> Sequence[Stage]:
        """Ask for both ends of each expert's band, and for L1 norms if they are to be kept."""
        stages: list[Stage] = []
        if self.scope != "row":
            ranks = band(self.density, self.gamma, outlier_first=self.order == "outlier_first")
            stages.append({"ends": TopK(of=magnitudes, ranks=ranks, scope=self.scope)})
        if self.rescale:
            stages.append({"before": Sum(of=magnitudes), "after": Sum(of=self._survivors)})
        return stages

    def _kept(self, sizes: Array, at: At, ends: Selection | None) -> Array:
        if ends is not None:
            return ends.mask(sizes, at, 0) & ~ends.mask(sizes, at, 1)
        ranks = band(self.density, self.gamma, outlier_first=self.order == "outlier_first")
        counts = ranks(sizes.shape[-1], sizes.shape[0])
        return top_of_rows(sizes, counts[:, 0]) & ~top_of_rows(sizes, counts[:, 1])

    def _survivors(
        self, base: Array, experts: Array, *, at: At, ends: Selection | None = None
    ) -> Array:
        sizes = abs(experts - base)
        return sizes * self._kept(sizes, at, ends)

    def middle(
        self,
        base: Array,
        experts: Array,
        at: At,
        ends: Selection | None,
        before: np.ndarray | None,
        after: np.ndarray | None,
    ) -> Array:
        """Return the task vectors without their largest and smallest entries, (t, n)."""
        tau = experts - base
        tau = tau * self._kept(abs(tau), at, ends)
        if before is None or after is None:
            return tau
        return tau * column(l1_factors(before, after), tau)

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
        """Merge one block. Raises InputError if normalised weights sum to zero."""
        tau = self.middle(base, experts, at, ends, before, after)
        return combine(base, tau, self.weight, scale=self.scale, normalize=self.normalize)


def grain_of(scope: Within, official: bool) -> Grain:
    """Return the blocks that ranks within `scope` need."""
    if scope != "row":
        return "element"
    return "row" if official else "filter"


def check_band(
    name: str, density: float | tuple[float, ...], gamma: float | tuple[float, ...]
) -> None:
    """Raise InputError if more than all would be kept or dropped; a density of 1 drops nothing."""
    count = max(len(v) if isinstance(v, tuple) else 1 for v in (density, gamma))
    densities = density if isinstance(density, tuple) else (density,) * count
    gammas = gamma if isinstance(gamma, tuple) else (gamma,) * count
    for d, g in zip(densities, gammas, strict=False):
        if g >= 1 or (d < 1 and d + g > 1 + 1e-9):
            raise InputError(
                f"{name}: density = {d} and gamma = {g}: kept and dropped shares exceed 1; lower "
                f"gamma to {max(1 - d, 0):.3g} or density to {max(1 - g, 0):.3g}"
            )

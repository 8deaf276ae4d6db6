"""TIES-Merging: trim small updates, elect a sign per coordinate, average what agrees.

Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708, section 3.

    tau_t = theta_t - theta_0, zeroed outside its top `density` by magnitude    (t, n)
    gamma = sign(sum_t w_t tau_t)                                               (n,)
    S_t   = w_t tau_t where its sign is gamma, else 0                           (t, n)
    theta = theta_0 + scale * sum_t S_t / sum over {t : S_t != 0} of w_t        (n,)

`scope="tensor"` trims each tensor by itself, as mergekit does; `scope="model"` trims the whole task
vector, as the paper does; `"row"` each vector along the last axis. `tie="positive"` gives a
coordinate whose votes cancel the sign +, as mergekit does; `"global"` the majority sign of the
whole model (zero counts as minus), as the authors' code does. `count="exact"` keeps int(density n)
elements, ties by position; `"official"` keeps int(density n) + 1 and all that equal the threshold,
as the authors' kthvalue does. `agg` chooses the mean above, the sum without a divisor, or the
largest of the agreeing updates.

`elect` chooses how votes count, after the authors' code: by `"mass"` as above; by squared shares of
each trimmed task vector's norm, where the largest share decides (`"normfrac"`) or their signed sum
(`"normmass"`). `rescale` restores the L1 norm that trimming took, as in mergekit.

Deviates from mergekit: negative weights together with `normalize` are an error, because the
divisor can pass through zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.fold import Sum, magnitudes
from pluribus.core.merger import At, FractionPerExpert, Grain, PerExpert, Scope, Stage, merger
from pluribus.core.order import Order, Ranked, Selection, TopK, share_of
from pluribus.core.sparse import (
    add_up,
    agreeing,
    disjoint,
    l1_factors,
    refuse_negative,
    top_of_rows,
)


@merger("ties", paper="arXiv:2306.01708")
@dataclass(frozen=True, kw_only=True)
class Ties:
    """Trim, elect, disjoint mean."""

    density: FractionPerExpert = 1.0  # share of coordinates each expert keeps
    weight: PerExpert = 1.0
    scale: float = 1.0  # lambda in the paper
    normalize: bool = True  # divide by the weights of the agreeing experts
    scope: Literal["tensor", "model", "row"] = "tensor"
    elect: Literal["mass", "normfrac", "normmass"] = "mass"
    tie: Literal["positive", "global"] = "positive"
    count: Literal["exact", "official"] = "exact"
    agg: Literal["mean", "sum", "max"] = "mean"
    int8_mask: bool = False  # mergekit's memory switch; read and ignored
    rescale: bool = False  # restore each expert's L1 norm after trimming

    def check(self) -> None:
        """Raise InputError for weights that make the divisor cross zero."""
        if self.normalize and self.agg == "mean":
            refuse_negative("ties", self.weight)

    @property
    def grain(self) -> Grain:
        """Whole rows where rows are trimmed."""
        return "row" if self.scope == "row" else "element"

    @property
    def fusible(self) -> bool:
        """Whether the fused kernel does this variant."""
        return self.elect == "mass" and not self.rescale and self.scope != "row"

    def folds(self) -> Sequence[Stage]:
        """Ask for each expert's cut, and for what rescaling, electing and tie breaking go by."""
        official = self.count == "official"
        kind = Order if official else TopK
        ranks = share_of(self.density, official=official)
        wide: Scope = "model" if self.scope == "model" else "tensor"
        stages: list[Stage] = []
        if self.scope != "row":
            stages.append({"trim": kind(of=magnitudes, ranks=ranks, scope=wide)})
        if self.rescale:
            before, after = Sum(of=magnitudes, scope=wide), Sum(of=self._sizes, scope=wide)
            stages.append({"before": before, "after": after})
        if self.elect != "mass":
            stages.append({"norms": Sum(of=self._squares, scope=wide)})
        if self.tie == "global":
            stages.append({"majority": Sum(of=self._votes, scope="model")})
        return stages

    def _kept(self, base: Array, experts: Array, at: At, trim: Selection | Ranked | None) -> Array:
        """Trimmed task vectors."""
        tau = experts - base
        size = abs(tau)
        if isinstance(trim, Selection):
            return tau * trim.mask(size, at)
        if trim is not None:
            return tau * (size >= column(tuple(trim.values[:, 0].tolist()), experts))
        ranks = share_of(self.density, official=self.count == "official")
        counts = ranks(size.shape[-1], size.shape[0])[:, 0]
        keep = top_of_rows(size, counts)
        if self.count == "official":  # and all that equal the last of them
            xp = namespace(size)
            least = xp.min(xp.where(keep, size, float("inf")), axis=-1, keepdims=True)
            keep = size >= least
        return tau * keep

    def _sizes(
        self, base: Array, experts: Array, *, at: At, trim: Selection | Ranked | None = None
    ) -> Array:
        return abs(self._kept(base, experts, at, trim))

    def _trimmed(
        self,
        base: Array,
        experts: Array,
        at: At,
        trim: Selection | Ranked | None,
        before: np.ndarray | None,
        after: np.ndarray | None,
    ) -> Array:
        tau = self._kept(base, experts, at, trim)
        if before is not None and after is not None:
            tau = tau * column(l1_factors(before, after), tau)
        return tau * column(self.weight, experts)

    def _squares(
        self,
        base: Array,
        experts: Array,
        *,
        at: At,
        trim: Selection | Ranked | None = None,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
    ) -> Array:
        tau = self._trimmed(base, experts, at, trim, before, after)
        return tau * tau

    def _signs(self, tau: Array, norms: np.ndarray | None) -> Array:
        """Sign that wins each coordinate, 0 where the votes cancel."""
        xp = namespace(tau)
        if norms is None:
            return xp.sign(add_up(tau))
        lengths = np.sqrt(np.where(norms > 0, norms, 1.0))
        unit = tau / column(tuple(lengths.tolist()), tau)
        votes = unit * abs(unit)
        if self.elect == "normmass":
            return xp.sign(add_up(votes))
        largest = votes[0]
        for row in votes[1:]:
            largest = xp.where(abs(row) > abs(largest), row, largest)
        return xp.sign(largest)

    def _votes(
        self,
        base: Array,
        experts: Array,
        *,
        at: At,
        trim: Selection | Ranked | None = None,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
        norms: np.ndarray | None = None,
    ) -> Array:
        return self._signs(self._trimmed(base, experts, at, trim, before, after), norms)[None]

    def __call__(
        self,
        base: Float[Array, "..."],
        experts: Float[Array, "t ..."],
        *,
        at: At,
        trim: Selection | Ranked | None = None,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
        norms: np.ndarray | None = None,
        majority: np.ndarray | None = None,
    ) -> Float[Array, "..."]:
        """Merge one block."""
        xp = namespace(base)
        tau = self._trimmed(base, experts, at, trim, before, after)
        sign = self._signs(tau, norms)
        tie = 1.0 if majority is None else float(np.sign(majority[0]))
        sign = xp.where(sign == 0, tie, sign)
        agrees = agreeing(tau, sign)
        if self.agg == "max":
            kept = base * 0
            for row, agree in zip(tau, agrees, strict=True):
                kept = xp.maximum(kept, abs(row) * agree)
            return base + self.scale * (kept * sign)
        kept, divisor = disjoint(tau, agrees, column(self.weight, tau))
        if self.agg == "mean" and self.normalize:
            kept = kept / xp.where(divisor == 0, 1.0, divisor)
        return base + self.scale * kept

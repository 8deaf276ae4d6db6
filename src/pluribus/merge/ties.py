"""TIES-Merging: trim small updates, elect a sign per coordinate, average what agrees.

Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708, section 3.

    tau_t = theta_t - theta_0, zeroed outside its top `density` by magnitude    (t, n)
    gamma = sign(sum_t w_t tau_t)                                               (n,)
    S_t   = w_t tau_t where its sign is gamma, else 0                           (t, n)
    theta = theta_0 + scale * sum_t S_t / sum over {t : S_t != 0} of w_t        (n,)

`scope="tensor"` trims each tensor by itself, as mergekit does; `scope="model"` trims the whole task
vector, as the paper does. `tie="positive"` gives a coordinate whose votes cancel the sign +, as
mergekit does; `"global"` the majority sign of the whole model (zero counts as minus), as the
authors' code does. `count="exact"` keeps int(density n) elements, ties by position; `"official"`
keeps int(density n) + 1 and all that equal the threshold, as the authors' kthvalue does.
`agg` chooses the mean above, the sum without a divisor, or the largest of the agreeing updates.

Deviates from mergekit: negative weights together with `normalize` are an error, because the
divisor can pass through zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.errors import InputError
from pluribus.core.fold import Order, Ranked, Selection, Sum, TopK, magnitudes, share_of
from pluribus.core.merger import At, FractionPerExpert, PerExpert, Scope, Stage, merger


@merger("ties", paper="arXiv:2306.01708")
@dataclass(frozen=True, kw_only=True)
class Ties:
    """Trim, elect, disjoint mean."""

    density: FractionPerExpert = 1.0  # share of coordinates each expert keeps
    weight: PerExpert = 1.0
    scale: float = 1.0  # lambda in the paper
    normalize: bool = True  # divide by the weights of the agreeing experts
    scope: Scope = "tensor"
    tie: Literal["positive", "global"] = "positive"
    count: Literal["exact", "official"] = "exact"
    agg: Literal["mean", "sum", "max"] = "mean"
    int8_mask: bool = False  # mergekit's memory switch; read and ignored
    rescale: bool = False  # mergekit accepts it for every sparsifying method

    def check(self) -> None:
        """Raise InputError for weights that make the divisor cross zero."""
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        if self.normalize and self.agg == "mean" and min(weights) < 0:
            raise InputError(
                f"ties: weight = {self.weight}: negative weights need normalize: false, or the "
                "divisor can pass through zero"
            )

    def folds(self) -> Sequence[Stage]:
        """Ask for each expert's cut, and the model's majority sign if ties go by it."""
        official = self.count == "official"
        kind = Order if official else TopK
        ranks = share_of(self.density, official=official)
        trim = {"trim": kind(of=magnitudes, ranks=ranks, scope=self.scope)}
        if self.tie == "positive":
            return [trim]
        return [trim, {"majority": Sum(of=self._votes, scope="model")}]

    def _trimmed(self, base: Array, experts: Array, at: At, trim: Selection | Ranked) -> Array:
        tau = experts - base
        size = abs(tau)
        if isinstance(trim, Selection):
            keep = trim.mask(size, at)
        else:
            keep = size >= column(tuple(trim.values[:, 0].tolist()), experts)
        return tau * keep * column(self.weight, experts)

    def _votes(self, base: Array, experts: Array, at: At, trim: Selection | Ranked) -> Array:
        tau = self._trimmed(base, experts, at, trim)
        total = tau[0]
        for row in tau[1:]:
            total = total + row
        return namespace(base).sign(total)[None]

    def __call__(
        self,
        base: Float[Array, " n"],
        experts: Float[Array, "t n"],
        *,
        at: At,
        trim: Selection | Ranked,
        majority: object = None,
    ) -> Float[Array, " n"]:
        """Merge one block."""
        xp = namespace(base)
        tau = self._trimmed(base, experts, at, trim)
        total = tau[0]
        for row in tau[1:]:
            total = total + row
        default = 1.0 if majority is None else float(xp.sign(majority[0]))  # type: ignore[index]
        sign = xp.where(total == 0, default, xp.sign(total))
        plus = sign > 0
        agrees = xp.where(plus, tau > 0, tau < 0)
        weights = column(self.weight, experts)
        kept, divisor = base * 0, base * 0
        for row, agree, weight in zip(tau, agrees, weights, strict=True):
            if self.agg == "max":
                kept = xp.maximum(kept, abs(row) * agree)
            else:
                kept = kept + row * agree
            divisor = divisor + agree * weight
        if self.agg == "max":
            kept = kept * sign
        elif self.agg == "mean" and self.normalize:
            kept = kept / xp.where(divisor == 0, 1.0, divisor)
        return base + self.scale * kept

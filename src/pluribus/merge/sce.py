"""SCE: select elements by their variance, weigh experts by their energy, erase minority signs.

Wan et al., 2024, https://arxiv.org/abs/2408.07990 (FuseChat), section 3.3; mergekit `sce`.

    v      = variance over t of tau_t = theta_t - theta_0                                     (n,)
    tau_t  = 0 outside the int(select_topk m) largest v, m the number of v != 0               (t, n)
    w_t    = mean_n tau_t^2 / sum_t mean_n tau_t^2                                            (t,)
    gamma  = sign(sum_t tau_t), + where it cancels                                            (n,)
    theta  = theta_0 + sum_t w_t tau_t [sign(tau_t) = gamma] / sum of the w_t that agree      (n,)

As in mergekit a divisor counts as at least 1e-6, and all experts weigh the same where their squares
add up to less than 1e-6 (updates of about 1e-3, which fine-tuning often makes).

Deviates from mergekit: equal variances by place. Two passes; one more with select_topk < 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.fold import Sum
from pluribus.core.merger import At, Share, Stage, merger
from pluribus.core.order import Ranks, Selection, TopK
from pluribus.core.sparse import add_up, agreeing, disjoint, elected


@merger("sce", paper="arXiv:2408.07990")
@dataclass(frozen=True, kw_only=True)
class Sce:
    """Select, calculate, erase."""

    select_topk: Share = 1.0  # share of the elements with any variance that take part
    int8_mask: bool = False  # mergekit's memory switch; read and ignored

    def folds(self) -> Sequence[Stage]:
        """Ask for the selection, then for the energy of what it leaves."""
        energy: Stage = {"energy": Sum(of=self._squares)}
        if self.select_topk >= 1:
            return [energy]
        chosen = TopK(of=variance, ranks=_ranks(self.select_topk), nonzero=True)
        return [{"chosen": chosen}, energy]

    def _updates(self, base: Array, experts: Array, at: At, chosen: Selection | None) -> Array:
        tau = experts - base
        return tau if chosen is None else tau * chosen.mask(variance(base, experts), at)

    def _squares(
        self, base: Array, experts: Array, *, at: At, chosen: Selection | None = None
    ) -> Array:
        tau = self._updates(base, experts, at, chosen)
        return tau * tau

    def __call__(
        self,
        base: Float[Array, " n"],
        experts: Float[Array, "t n"],
        *,
        at: At,
        energy: np.ndarray,
        chosen: Selection | None = None,
    ) -> Float[Array, " n"]:
        """Merge one block."""
        tau = self._updates(base, experts, at, chosen)
        mean = energy / at.size
        total = mean.sum()
        weights = np.full(mean.shape, 1 / mean.size) if total < 1e-6 else mean / total
        weight = column(tuple(weights.tolist()), tau)
        kept, divisor = disjoint(tau * weight, agreeing(tau, elected(tau)), weight)
        return base + kept / namespace(tau).clip(divisor, min=1e-6)


def variance(base: Array, experts: Array) -> Array:
    """Variance of the updates over the experts, (1, n); exactly 0 where all are equal."""
    tau = experts - base
    part = 1 / tau.shape[0]
    rest = tau - (tau[0] + add_up(tau - tau[0]) * part)
    return (add_up(rest * rest) * part)[None]


def _ranks(share: float) -> Ranks:
    """Return ranks that keep int(share · n) elements, of n that are not zero."""
    return lambda size, rows: np.full((rows, 1), int(size * share), np.int64)

"""SCE: select elements by their variance, weigh experts by their energy, erase minority signs.

Wan et al., 2024, https://arxiv.org/abs/2408.07990 (FuseChat), section 3.3; mergekit `sce`.

    v      = variance over t of tau_t = theta_t - theta_0                                     (n,)
    tau_t  = 0 outside the int(select_topk m) largest v, m the number of v != 0               (t, n)
    w_t    = mean_n tau_t^2 / sum_t mean_n tau_t^2                                            (t,)
    gamma  = sign(sum_t tau_t), + where it cancels                                            (n,)
    theta  = theta_0 + sum_t w_t tau_t [sign(tau_t) = gamma] / sum of the w_t that agree      (n,)

As in mergekit a divisor counts as at least 1e-6, and all experts weigh the same where their squares
add up to less than 1e-6 (updates of about 1e-3, which fine-tuning often makes).

Deviates from mergekit: equal variances by place. Two passes; two more with select_topk < 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.fold import Selection, Sum, TopK
from pluribus.core.merger import At, Share, Stage, merger
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
        return [{"chosen": _TopOfNonzero(of=variance, share=self.select_topk)}, energy]

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
    rest = tau - (tau[0] + add_up(tau - tau[0]) / tau.shape[0])
    return (add_up(rest * rest) / tau.shape[0])[None]


@dataclass(frozen=True, kw_only=True)
class _TopOfNonzero(Sum):
    """Counts the values that are not zero, then selects the largest `share` of so many."""

    share: float

    def update(self, state: Any, values: Array, at: At) -> Any:
        """See `Fold`."""
        return super().update(state, namespace(values).astype(values != 0, values.dtype), at)

    def finish(self, state: Any) -> TopK:  # type: ignore[override]
        """Return the fold that selects."""
        counts = state.total()

        def ranks(size: int, rows: int) -> np.ndarray:
            return np.array([[int(int(count) * self.share)] for count in counts[:rows]])

        return TopK(of=self.of, ranks=ranks)

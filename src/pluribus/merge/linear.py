"""Weighted average of the experts (model soups).

Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482; mergekit `linear`.

    theta = sum_t w_t theta_t / sum_t w_t      (the divisor only if `normalize`)      (n,)

Deviates from mergekit: weights that sum to zero are an error, not an infinity.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, namespace, per_expert
from pluribus.core.errors import InputError
from pluribus.core.merger import PerExpert, merger


@merger("linear", paper="arXiv:2203.05482", base="ignored")
@dataclass(frozen=True, kw_only=True)
class Linear:
    """Weighted average; `base`, if named among the models, is an input like the others."""

    weight: PerExpert = 1.0  # relative share of each expert
    normalize: bool = True

    def shares(self, count: int) -> tuple[float, ...]:
        """Return the factor of each expert. Raises InputError if they cannot be normalised."""
        weights = per_expert(self.weight, count)
        if not self.normalize:
            return weights
        total = sum(weights)
        if abs(total) < 1e-8:
            raise InputError(f"linear: weights {self.weight} sum to zero; set normalize: false")
        return tuple(weight / total for weight in weights)

    def __call__(self, base: Array | None, experts: Float[Array, "t n"]) -> Float[Array, " n"]:
        """Average the experts, rounding once. Raises InputError if weights sum to zero."""
        xp = namespace(experts)
        shares = self.shares(experts.shape[0])
        merged = xp.astype(experts[0], xp.float64) * shares[0]
        for expert, share in zip(experts[1:], shares[1:], strict=True):
            merged = merged + xp.astype(expert, xp.float64) * share
        return xp.astype(merged, experts.dtype)

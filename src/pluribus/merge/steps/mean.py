"""Average each coordinate over the experts that still update it (the disjoint mean of TIES).

Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708, section 3, step 3.

    sum_t w_t values_t / sum over {t : values_t != 0} of w_t     (t, n) -> (n,)

Where nothing is left the update is 0. `average` divides by all weights instead.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.chain import step
from pluribus.core.merger import PerExpert
from pluribus.core.sparse import disjoint, refuse_negative


@step("mean", kind="combine", paper="arXiv:2306.01708")
@dataclass(frozen=True, kw_only=True)
class Mean:
    """Disjoint mean."""

    weight: PerExpert = 1.0

    def check(self) -> None:
        """Raise InputError for weights that make the divisor cross zero."""
        refuse_negative("mean", self.weight)

    def __call__(self, values: Float[Array, "t ..."]) -> Float[Array, "..."]:
        """Combine one block."""
        weights = column(self.weight, values)
        total, divisor = disjoint(values * weights, values != 0, weights)
        return total / namespace(values).where(divisor == 0, 1.0, divisor)

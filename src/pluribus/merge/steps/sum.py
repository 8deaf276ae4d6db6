"""Add the experts' updates (task arithmetic).

Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089.

    sum_t w_t values_t     (t, n) -> (n,)
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column
from pluribus.core.chain import step
from pluribus.core.merger import PerExpert


@step("sum", kind="combine", paper="arXiv:2212.04089")
@dataclass(frozen=True, kw_only=True)
class Sum:
    """Weighted sum."""

    weight: PerExpert = 1.0

    def __call__(self, values: Float[Array, "t *n"]) -> Float[Array, "*n"]:
        """Combine one block."""
        weights = column(self.weight, values)
        total = values[0] * weights[0]
        for row, weight in zip(values[1:], weights[1:], strict=True):
            total = total + row * weight
        return total

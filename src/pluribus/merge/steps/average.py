"""Average each coordinate over all experts, zeros included.

    sum_t w_t values_t / sum_t w_t     (t, n) -> (n,)
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column, per_expert
from pluribus.core.chain import step
from pluribus.core.errors import InputError
from pluribus.core.merger import PerExpert


@step("average", kind="combine", paper="arXiv:2203.05482")
@dataclass(frozen=True, kw_only=True)
class Average:
    """Weighted average."""

    weight: PerExpert = 1.0

    def __call__(self, values: Float[Array, "t *n"]) -> Float[Array, "*n"]:
        """Combine one block. Raises InputError if the weights sum to zero."""
        divisor = sum(per_expert(self.weight, values.shape[0]))
        if abs(divisor) < 1e-8:
            raise InputError(f"average: weights {self.weight} sum to zero; use sum instead")
        weights = column(self.weight, values) / divisor
        total = values[0] * weights[0]
        for row, weight in zip(values[1:], weights[1:], strict=True):
            total = total + row * weight
        return total

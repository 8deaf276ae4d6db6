"""Average each coordinate over all experts, zeros included.

sum_t w_t values_t / sum_t w_t     (t, n) -> (n,)
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column
from pluribus.core.chain import step
from pluribus.core.merger import PerExpert
from pluribus.core.sparse import add_up, total_weight


@step("average", kind="combine", paper="arXiv:2203.05482")
@dataclass(frozen=True, kw_only=True)
class Average:
    """Weighted average."""

    weight: PerExpert = 1.0

    def __call__(self, values: Float[Array, "t ..."]) -> Float[Array, "..."]:
        """Combine one block. Raises InputError if the weights sum to zero."""
        divisor = total_weight(self.weight, values.shape[0])
        return add_up(values * (column(self.weight, values) / divisor))

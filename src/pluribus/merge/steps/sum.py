"""Add the experts' updates (task arithmetic).

Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089.

    sum_t w_t values_t     (t, n) -> (n,)
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column
from pluribus.core.chain import step
from pluribus.core.merger import PerExpert
from pluribus.core.sparse import add_up


@step("sum", kind="combine", paper="arXiv:2212.04089")
@dataclass(frozen=True, kw_only=True)
class Sum:
    """Weighted sum."""

    weight: PerExpert = 1.0

    def __call__(self, values: Float[Array, "t ..."]) -> Float[Array, "..."]:
        """Combine one block."""
        return add_up(values * column(self.weight, values))

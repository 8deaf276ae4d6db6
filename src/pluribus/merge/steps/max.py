"""Take each coordinate's largest update by magnitude (MagMax; after `elect`, EMR's unified vector).

Marczak et al., ECCV 2024, https://arxiv.org/abs/2407.06322.

    values_t of the t with the largest |values_t|, the last of equals     (t, n) -> (n,)
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, namespace
from pluribus.core.chain import step


@step("max", kind="combine", paper="arXiv:2407.06322", ordered=True)
@dataclass(frozen=True, kw_only=True)
class Max:
    """Largest update."""

    def __call__(self, values: Float[Array, "t ..."]) -> Float[Array, "..."]:
        """Combine one block."""
        xp = namespace(values)
        best = values[0]
        for row in values[1:]:
            best = xp.where(abs(row) >= abs(best), row, best)
        return best

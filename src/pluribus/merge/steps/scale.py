"""Multiply updates by a factor: one for all, or one for each expert before they are combined.

scale_t values_t     (t, n) -> (t, n)
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column
from pluribus.core.chain import step
from pluribus.core.merger import PerExpert


@step("scale", kind="each")
@dataclass(frozen=True, kw_only=True)
class Scale:
    """Rescale."""

    scale: PerExpert = 1.0  # lambda in most papers

    def __call__(self, values: Float[Array, "t ..."]) -> Float[Array, "t ..."]:
        """Scale one block."""
        return values * column(self.scale, values)

"""One model's tensors as they are, or times a number.

mergekit `passthrough`, for stacking layers of several models.

    merged = theta_1, or scale * theta_1     (n,)

One pass.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, per_expert
from pluribus.core.merger import PerExpert, merger


@merger("passthrough", base="ignored", experts=(1, 1))
@dataclass(frozen=True, kw_only=True)
class Passthrough:
    """Copy, or scale."""

    scale: PerExpert | None = None

    def __call__(self, base: Array | None, experts: Float[Array, "1 n"]) -> Float[Array, " n"]:
        """Merge one block."""
        return experts[0] if self.scale is None else experts[0] * per_expert(self.scale, 1)[0]

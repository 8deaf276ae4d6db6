"""MagMax: at every coordinate, the update of largest magnitude.

Marczak et al., ECCV 2024, https://arxiv.org/abs/2407.06322, section 4.

    tau_t = theta_t - theta_0                                                   (t, n)
    theta = theta_0 + scale * tau_{t*},  t* = argmax_t |tau_t|                  (n,)

Of equally large updates the later expert's is taken, as in the authors' code, so the order of
experts matters where they tie (often, in bfloat16). The paper tunes `scale`; 0.5 served its eight
independent fine-tunes. Cost: one pass.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.merger import PerExpert, merger


@merger("magmax", paper="arXiv:2407.06322", ordered=True)
@dataclass(frozen=True, kw_only=True)
class MagMax:
    """Largest update by magnitude."""

    weight: PerExpert = 1.0  # multiplies each task vector before they are compared
    scale: float = 1.0  # lambda in the paper

    def __call__(
        self, base: Float[Array, " n"], experts: Float[Array, "t n"]
    ) -> Float[Array, " n"]:
        """Merge one block."""
        xp = namespace(base)
        tau = (experts - base) * column(self.weight, experts)
        kept = tau[0]
        for row in tau[1:]:
            kept = xp.where(abs(row) >= abs(kept), row, kept)
        return base + self.scale * kept

"""Spherical interpolation between the base and one expert.

Shoemake, SIGGRAPH 1985; mergekit `slerp`. The whole tensor is one vector:

    theta  = angle between theta_0 and theta_1                                     (one number)
    merged = (sin((1 - t) theta) theta_0 + sin(t theta) theta_1) / sin(theta)      (n,)

and (1 - t) theta_0 + t theta_1 where |cos| > 0.9995. `t` is 0 at the base and 1 at the expert;
beyond that it extrapolates. A vector shorter than 1e-8 counts as it is, not as a direction.

Two passes: three inner products in float64, then the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float
from pluribus.core.fold import Gram, with_base
from pluribus.core.merger import Stage, merger

STRAIGHT = 0.9995  # from this |cos| on the arc is a line


@merger("slerp", paper="doi:10.1145/325165.325242", experts=(1, 1))
@dataclass(frozen=True, kw_only=True)
class Slerp:
    """Interpolate along the arc."""

    t: float  # 0: the base, 1: the expert

    def folds(self) -> Sequence[Stage]:
        """Ask for the inner products of base and expert."""
        return [{"gram": Gram(of=with_base)}]

    def __call__(
        self, base: Float[Array, " n"], experts: Float[Array, "1 n"], *, gram: np.ndarray
    ) -> Float[Array, " n"]:
        """Merge one block."""
        a, b = self.coefficients(gram)
        return base * a + experts[0] * b

    def coefficients(self, gram: np.ndarray) -> tuple[float, float]:
        """Return what base and expert are multiplied by."""
        norms = np.sqrt(np.diag(gram))
        norms = np.where(norms > 1e-8, norms, 1.0)
        cos = float(np.clip(gram[0, 1] / norms[0] / norms[1], -1, 1))
        if abs(cos) > STRAIGHT:
            return 1 - self.t, self.t
        angle = np.arccos(cos)
        a, b = np.sin((1 - self.t) * angle), np.sin(self.t * angle)
        return float(a / np.sin(angle)), float(b / np.sin(angle))

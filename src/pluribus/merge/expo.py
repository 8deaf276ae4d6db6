"""ExPO: extrapolate past a model along its own update.

Zheng et al., 2024, https://arxiv.org/abs/2404.16792, equation 1.

    theta = theta_1 + alpha (theta_1 - theta_0)                                 (n,)

theta_0 is the weaker checkpoint (before preference training), theta_1 the stronger; `alpha` = 0
gives theta_1 to the bit. Of several experts theta_1 is the average, as in FusionBench. Cost: one
pass.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import merger


@merger("expo", paper="arXiv:2404.16792")
@dataclass(frozen=True, kw_only=True)
class Expo:
    """Weak-to-strong extrapolation."""

    alpha: float = 0.3  # how far past the expert; the paper searches 0.1 to 0.5

    def __call__(
        self, base: Float[Array, " n"], experts: Float[Array, "t n"]
    ) -> Float[Array, " n"]:
        """Merge one block."""
        mean = experts[0]
        for expert in experts[1:]:
            mean = mean + expert
        mean = mean / experts.shape[0]
        return mean + self.alpha * (mean - base)

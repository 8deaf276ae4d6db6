"""Task arithmetic: add the weighted sum of the updates to the base.

Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089, section 2; mergekit `task_arithmetic`.

    theta = theta_0 + scale * sum_t w_t (theta_t - theta_0)     (the sum / sum_t w_t if `normalize`)

A negative weight subtracts a task ("forgetting by negation"). Deviates from mergekit: normalised
weights that sum to zero are an error; there the divisor silently becomes 1. One pass.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import FractionPerExpert, PerExpert, merger
from pluribus.core.sparse import combine


@merger("task_arithmetic", paper="arXiv:2212.04089")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic:
    """Weighted sum of task vectors."""

    weight: PerExpert = 1.0
    scale: float = 1.0  # lambda in the paper
    normalize: bool = False
    density: FractionPerExpert = 1.0  # mergekit accepts these three and uses none of them
    rescale: bool = False
    int8_mask: bool = False

    def __call__(
        self, base: Float[Array, " n"], experts: Float[Array, "t n"]
    ) -> Float[Array, " n"]:
        """Merge one block. Raises InputError if normalised weights sum to zero."""
        return combine(
            base, experts - base, self.weight, scale=self.scale, normalize=self.normalize
        )

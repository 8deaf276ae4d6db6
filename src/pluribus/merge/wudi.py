"""WUDI: the update that interferes least with the inputs each task vector is made of.

Cheng et al., ICML 2025, "Whoever Started the Interference Should End It",
https://arxiv.org/abs/2503.08099, equation 8 and algorithm 1.

    loss(tau) = sum_t ||(tau - tau_t) tau_t^T||^2 / ||tau_t||^2                 tau_t (r, c)
    theta     = theta_0 + scale * tau, tau after `steps` Adam steps from sum_t tau_t

No data and no chance: rows of a task vector span the inputs it was trained on. The gradient is
2 (tau H - C), with H = sum_t tau_t^T tau_t / ||tau_t||^2 (c, c) and C = sum_t tau_t tau_t^T tau_t /
||tau_t||^2, so a step costs one product whatever the number of experts. `solver="exact"` jumps to
the minimum, C H^+, keeping the start where H is blind; the paper stops early instead.

Tensors of more than two axes are taken as (r, all further axes); FusionBench averages them. Tensors
with fewer than two axes, and those whose name holds an `exclude` string, get theta_0 + scale *
mean_t tau_t. A task vector of zeros adds no term (FusionBench: NaN). Cost: `steps` products of
(r, c) by (c, c) per matrix; a (c, c) matrix of memory.
"""

from dataclasses import dataclass
from typing import Literal

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import At, Positive, PositiveInt, merger
from pluribus.core.spectral import added, averaged, is_matrix, task_matrices


@merger("wudi", paper="arXiv:2503.08099", grain="tensor")
@dataclass(frozen=True, kw_only=True)
class Wudi:
    """Data-free interference minimisation."""

    steps: PositiveInt = 300
    lr: Positive = 1e-5
    scale: float = 1.0
    solver: Literal["adam", "exact"] = "adam"
    exclude: tuple[str, ...] = ()

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At
    ) -> Float[Array, "..."]:
        """Merge one tensor."""
        import torch

        if not is_matrix(base, at, self.exclude):
            return averaged(base, experts, self.scale)
        tau = task_matrices(base, experts)
        size = tau.square().sum((1, 2))  # (t,)
        live = size > 0
        unit = tau[live] / size[live].sqrt()[:, None, None]
        h = (unit.mT @ unit).sum(0)  # (c, c)
        c = (tau[live] @ (unit.mT @ unit)).sum(0)  # (r, c)
        merged = tau.sum(0)
        if self.solver == "exact":
            residual = c - merged @ h
            return added(
                base,
                self.scale * (merged + residual @ torch.linalg.pinv(h, rtol=1e-10, hermitian=True)),
            )
        # float32 steps, as published: 300 products in float64 would double the cost.
        kind = torch.float64 if "64" in str(base.dtype) else torch.float32
        merged, h, c = merged.to(kind), h.to(kind), c.to(kind)
        first, second = torch.zeros_like(merged), torch.zeros_like(merged)
        for step in range(1, self.steps + 1):
            slope = 2 * (merged @ h - c)
            first.lerp_(slope, 0.1)
            second.mul_(0.999).addcmul_(slope, slope, value=0.001)
            move = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            merged.addcdiv_(first, move, value=-self.lr / (1 - 0.9**step))
        return added(base, self.scale * merged.to(torch.float64))

"""TSV-M: keep each task's top singular vectors, and make those of different tasks orthogonal.

Gargiulo et al., CVPR 2025, "Task Singular Vectors", https://arxiv.org/abs/2412.00081, algorithm 1.
With m = min(r, c), t experts and k = int(m / t):

    U_t diag(sigma_t) V_t^T   the k largest singular triples of w_t tau_t       (r, c)
    U, V                      [U_1 .. U_t], [V_1 .. V_t], each replaced by its nearest orthonormal
                              matrix (Procrustes)
    theta                     theta_0 + scale * U diag(sigma_1 .. sigma_t) V^T

Tensors of more than two axes are taken as (r, all further axes); the authors' code averages them.
Tensors with fewer than two axes, and those whose name holds an `exclude` string, get theta_0 +
scale * mean_t w_t tau_t, as in the authors' code.

Deviates from it where a task matrix has rank below k (the authors fill up with LAPACK's arbitrary
null vectors, which then push real ones aside; here they are left out), where experts share
directions exactly, and where t > m (k is at least 1). Cost: t + 2 SVDs per matrix.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, column, per_expert
from pluribus.core.merger import At, PerExpert, merger
from pluribus.core.spectral import added, averaged, is_matrix, polar, svd, task_matrices


@merger("tsv_m", paper="arXiv:2412.00081", grain="tensor")
@dataclass(frozen=True, kw_only=True)
class TsvM:
    """Task singular vectors merging."""

    weight: PerExpert = 1.0  # multiplies each task vector
    scale: float = 1.0  # alpha in the paper
    exclude: tuple[str, ...] = ()

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At
    ) -> Float[Array, "..."]:
        """Merge one tensor."""
        import torch

        weights = per_expert(self.weight, experts.shape[0])
        if not is_matrix(base, at, self.exclude):
            weighted = base + column(weights, experts) * (experts - base)
            return averaged(base, weighted, self.scale)
        tau = task_matrices(base, experts)
        k = max(1, min(tau.shape[1:]) // tau.shape[0])
        parts = [svd(matrix * w) for matrix, w in zip(tau, weights, strict=True)]
        s = torch.cat([part.s[:k] for part in parts])
        if s.numel() == 0:
            return base * 1
        u = polar(torch.cat([part.u[:, :k] for part in parts], 1))
        vh = polar(torch.cat([part.vh[:k] for part in parts], 0))
        return added(base, (self.scale * u * s) @ vh)

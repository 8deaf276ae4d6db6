"""Iso-CTS: isotropic merging in a common subspace and in one subspace of each task's own.

Marczak et al., ICML 2025, "No Task Left Behind", https://arxiv.org/abs/2502.04959, section 4.2,
algorithm 2. With m = min(r, c) and t experts:

    K         directions kept of S = sum_t tau_t, its largest: U_c, sigma_c, V_c    `common` of m,
              rounded so that t divides m - K
    residual  tau_t - U_c U_c^T tau_t; its (m - K)/t largest: U_t, sigma_t, V_t
    U, V      [U_1 .. U_t U_c], [V_1 .. V_t V_c], each replaced by its nearest orthonormal matrix
    theta     theta_0 + scale * mean(all sigma) U V^T

Tensors of more than two axes are taken as (r, all further axes); the authors' code averages them.
Tensors with fewer than two axes, and those whose name holds an `exclude` string, get theta_0 +
scale * mean_t tau_t, as in the authors' code.

Deviates from it where a task matrix or residual has too low a rank to fill its share: the authors
fill up with LAPACK's arbitrary null vectors, here the missing directions are left out, of the mean
too. Cost: t + 3 SVDs per matrix.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import At, Share, merger
from pluribus.core.spectral import added, averaged, is_matrix, polar, svd, task_matrices


@merger("iso_cts", paper="arXiv:2502.04959", grain="tensor")
@dataclass(frozen=True, kw_only=True)
class IsoCts:
    """Isotropic merging in common and task-specific subspaces."""

    scale: float = 1.0  # alpha in the paper
    common: Share = 0.8  # share of directions for the common subspace (k/r in the paper)
    exclude: tuple[str, ...] = ()

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At
    ) -> Float[Array, "..."]:
        """Merge one tensor."""
        import torch

        if not is_matrix(base, at, self.exclude):
            return averaged(base, experts, self.scale)
        tau = task_matrices(base, experts)
        t, m = tau.shape[0], min(tau.shape[1:])
        each = min(round((m - int(m * self.common)) / t), m // t)
        total = svd(tau.sum(0))
        k = min(m - each * t, total.s.numel())
        shared = total.u[:, :k]
        us, ss, vs = [], [], []
        for matrix in tau if each else ():
            own = svd(matrix - shared @ (shared.T @ matrix))
            us.append(own.u[:, :each])
            ss.append(own.s[:each])
            vs.append(own.vh[:each])
        s = torch.cat([*ss, total.s[:k]])
        if s.numel() == 0:
            return base * 1
        u = polar(torch.cat([*us, shared], 1))
        vh = polar(torch.cat([*vs, total.vh[:k]], 0))
        return added(base, (self.scale * s.mean()) * (u @ vh))

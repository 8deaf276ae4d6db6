"""Iso-C: add the updates and give every singular direction of the sum the same strength.

Marczak et al., ICML 2025, "No Task Left Behind", https://arxiv.org/abs/2502.04959, section 4.1.

    U diag(sigma) V^T = sum_t (theta_t - theta_0)                               (r, c)
    theta = theta_0 + scale * mean(sigma) U V^T

Tensors of more than two axes are taken as (r, all further axes); the authors' code averages them.
Tensors with fewer than two axes, and those whose name holds an `exclude` string, get theta_0 +
scale * mean_t tau_t, as in the authors' code.

Deviates from it where the sum has less than full rank: directions without a singular value stay
empty and do not count in the mean (there the authors' result depends on LAPACK's arbitrary null
vectors). Cost: one SVD per matrix, O(r c min(r, c)).
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import At, merger
from pluribus.core.spectral import added, averaged, is_matrix, svd, task_matrices


@merger("iso_c", paper="arXiv:2502.04959", grain="tensor")
@dataclass(frozen=True, kw_only=True)
class IsoC:
    """Isotropic merging in the common subspace."""

    scale: float = 1.0  # alpha in the paper
    exclude: tuple[str, ...] = ()

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At
    ) -> Float[Array, "..."]:
        """Merge one tensor."""
        if not is_matrix(base, at, self.exclude):
            return averaged(base, experts, self.scale)
        u, s, vh = svd(task_matrices(base, experts).sum(0))
        if s.numel() == 0:
            return base * 1
        return added(base, (self.scale * s.mean()) * (u @ vh))

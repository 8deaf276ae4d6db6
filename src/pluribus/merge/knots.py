"""KnOTS: rotate the updates into one common basis, then merge them there.

Stoica et al., ICLR 2025, "Model merging with SVD to tie the Knots",
https://arxiv.org/abs/2410.19735, section 4. For LoRA experts, whose updates barely overlap
coordinate by coordinate:

    [tau_1 .. tau_t] = U diag(sigma) [V_1^T .. V_t^T]                           (r, t c), rank k
    M     = the `inner` method's merge of the t matrices diag(sigma) V_t^T, with base 0      (k, c)
    theta = theta_0 + scale * U M

The text merges the V_t and the authors' code diag(sigma) V_t, which weighs a direction by its
strength; the latter is done here (`aligned="plain"` does the former). `inner` is any merge method
or chain, and has its own `scale`. A linear `inner` gives what it gives without the rotation.

Tensors of more than two axes are taken as (r, all further axes); those with fewer than two go to
`inner` as they are. Deviates from the authors' code: what `inner` knows of the whole model (a cut
at scope "model") is taken over one aligned tensor; singular values are cut relative to the
largest, not at 1e-5. Cost: one SVD of (r, t c).
"""

from dataclasses import dataclass
from typing import Any, Literal

from pluribus.core.arrays import Array, Float
from pluribus.core.errors import InputError
from pluribus.core.merger import At, facts, merger
from pluribus.core.spectral import added, is_matrix, restored, svd, task_matrices


@merger("knots", paper="arXiv:2410.19735", grain="tensor")
@dataclass(frozen=True, kw_only=True)
class Knots:
    """An inner merge in the updates' common basis."""

    inner: Any = "ties"
    scale: float = 1.0
    aligned: Literal["scaled", "plain"] = "scaled"

    def check(self) -> None:
        """Raise InputError if `inner` is no method, or one that needs more than updates."""
        from pluribus.core.method import method_of

        inner = method_of(self.inner)
        if facts(inner).needs or facts(inner).name == "knots":
            raise InputError(f"knots: inner = {self.inner!r} needs more than the updates")

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At
    ) -> Float[Array, "..."]:
        """Merge one tensor."""
        import torch

        if not is_matrix(base, at):
            update = self._inner(experts - base, at)
            return (base.reshape(-1) + self.scale * update.reshape(-1)).reshape(base.shape)
        tau = task_matrices(base, experts)
        t, r, c = tau.shape
        u, s, vh = svd(tau.permute(1, 0, 2).reshape(r, t * c))
        if s.numel() == 0:
            return base * 1
        rows = (vh if self.aligned == "plain" else s[:, None] * vh).reshape(-1, t, c)
        merged = self._inner(restored(rows.permute(1, 0, 2).contiguous(), base), at)
        left = u * s if self.aligned == "plain" else u
        if not isinstance(merged, torch.Tensor):
            merged = torch.from_numpy(merged)
        return added(base, self.scale * (left @ merged.to(torch.float64)))

    def _inner(self, updates: Array, at: At) -> Array:
        """Merge updates (t, ...) with the inner method, whose base is zero."""
        from pluribus.core.method import method_of
        from pluribus.engine.reference import merge_arrays

        inner = method_of(self.inner)
        base = None if facts(inner).base == "ignored" else {at.name: updates[0] * 0}
        merged = merge_arrays(inner, base, [{at.name: update} for update in updates], seed=at.seed)
        return merged[at.name]

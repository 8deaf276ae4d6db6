"""RegMean: the weights whose outputs are, in least squares, nearest to every expert's own.

Jin et al., ICLR 2023, https://arxiv.org/abs/2212.09849, equation 2 and section 4.1.

    G_t   = w_t * input Gram matrix of expert t's layer, off-diagonal times `alpha`      (c, c)
    theta = (sum_t theta_t G_t) (sum_t G_t)^-1                                           (r, c)

G_t = mean of x x^T over the inputs x of the layer, by the weight's name
(`pluribus.calibrate.gram` measures it). A tensor without one is averaged by w_t. `transposed` says
that weights are stored (c, r), as in GPT-2's Conv1D; where the shape decides, it isn't needed.

Deviates from the authors' code: solved as mean + correction by Cholesky in float64, so that
directions no expert's data reaches keep the average, where an inverse would fail or explode.
Cost: O(c^3 + t r c^2) per weight.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float, per_expert
from pluribus.core.errors import InputError, MismatchError
from pluribus.core.merger import At, PerExpert, Share, merger
from pluribus.core.spectral import matrices, restored


@merger("regmean", paper="arXiv:2212.09849", grain="tensor", base="ignored", needs=("gram",))
@dataclass(frozen=True, kw_only=True)
class RegMean:
    """Regression mean of linear layers."""

    weight: PerExpert = 1.0  # relative share of each expert
    alpha: Share = 0.9  # off-diagonal shrink; the paper takes 0.9, and 0.1 for small models
    transposed: bool = False

    def check(self) -> None:
        """Raise InputError for weights that are no shares."""
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        if min(weights) < 0 or max(weights) == 0:
            raise InputError(
                f"regmean: weight = {self.weight}: weights must not be negative, nor all zero"
            )

    def __call__(
        self,
        base: Array | None,
        experts: Float[Array, "t ..."],
        *,
        at: At,
        gram: Float[Array, "t c c"] | None = None,
    ) -> Float[Array, "..."]:
        """Merge one tensor. Raises MismatchError if a Gram matrix does not fit its weight."""
        import torch

        shares = per_expert(self.weight, experts.shape[0])
        total = sum(shares)
        rows = experts.reshape(experts.shape[0], -1)
        mean = rows[0]
        for row, share in zip(rows[1:], shares[1:], strict=True):
            mean = mean + (share / total) * (row - rows[0])
        mean = mean.reshape(experts.shape[1:])
        if gram is None or len(mean.shape) < 2 or min(mean.shape) == 0:
            return mean
        theta, middle = matrices(experts, 1), matrices(mean, 0)
        c = gram.shape[-1]
        turned = len(mean.shape) == 2 and (
            middle.shape[1] != c or (self.transposed and middle.shape[0] == c)
        )
        if turned:
            theta, middle = theta.mT, middle.mT
        if middle.shape[1] != c:
            raise MismatchError(
                f"regmean: {at.name} has shape {list(mean.shape)}, but its Gram matrix is {c} x {c}"
            )
        g = matrices(gram, 1) * torch.tensor(
            shares, dtype=theta.dtype, device=theta.device
        ).reshape(-1, 1, 1)
        diagonal = torch.diagonal(g, dim1=1, dim2=2)
        g = self.alpha * g + torch.diag_embed((1 - self.alpha) * diagonal)
        pull = ((theta - middle) @ g).sum(0)  # (r, c)
        merged = middle + _solved(g.sum(0), pull)
        merged = merged.mT if turned else merged
        return restored(merged.reshape(tuple(mean.shape)), mean)


def _solved(gram, right):
    """Return X of least norm with X @ gram = right, for a positive semidefinite `gram`."""
    import torch

    size = torch.diagonal(gram).clamp(min=0).sqrt()
    live = size > 0
    inverse = torch.where(live, 1 / torch.where(live, size, 1.0), 0.0)
    unit = gram * inverse * inverse[:, None]  # correlations: scale-free
    unit.diagonal()[~live] = 1.0  # inputs that are always zero: no correction
    factor, failed = torch.linalg.cholesky_ex(unit)
    # Gram matrices arrive in float32: directions weaker than its rounding are noise.
    if int(failed) == 0 and float(factor.diagonal().min()) > 1e-3:
        return torch.cholesky_solve((right * inverse).mT, factor).mT * inverse
    return (right * inverse) @ torch.linalg.pinv(unit, rtol=1e-6, hermitian=True) * inverse

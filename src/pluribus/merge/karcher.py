"""Karcher mean: the point on the sphere nearest to all experts, at their mean length.

Karcher, Comm. Pure Appl. Math. 1977, for models https://arxiv.org/abs/2603.04972; mergekit
`karcher`. With unit vectors u_t = theta_t / |theta_t| of whole tensors and equal weights, from the
direction mu of their sum:

    v      = mean_t a_t / sin(a_t) (u_t - cos(a_t) mu),   a_t the angle between u_t and mu      (n,)
    mu    <- cos|v| mu + sin|v| v / |v|,                  until |v| < tol, at most max_iter times
    merged = mu * mean_t |theta_t|                                                              (n,)

All of it happens in the t coefficients of mu, which depend on the tensors by inner products alone:
two passes whatever `max_iter`. The base, if named among the models, is an input like the others.
Tensors of norm up to `tol` count in the mean length only. Where directions cancel the search starts
at the first; one exactly opposite to mu pulls nowhere.

Deviates from mergekit: if all norms are at most `tol` the nonzero ones count (there the result is
zero). Angles are found in float64: in float32, as there, those between close fine-tunes (below
about 1e-3) are rounding noise as large as what they did.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float
from pluribus.core.fold import Gram, models
from pluribus.core.merger import Positive, PositiveInt, Stage, merger
from pluribus.core.sparse import weighted_sum


@merger("karcher", paper="arXiv:2603.04972", base="ignored")
@dataclass(frozen=True, kw_only=True)
class Karcher:
    """Riemannian mean on the sphere."""

    max_iter: PositiveInt = 10
    tol: Positive = 1e-5

    def folds(self) -> Sequence[Stage]:
        """Ask for the experts' inner products."""
        return [{"gram": Gram(of=models)}]

    def __call__(
        self, base: Array | None, experts: Float[Array, "t n"], *, gram: np.ndarray
    ) -> Float[Array, " n"]:
        """Merge one block."""
        return weighted_sum(experts, self.coefficients(gram))

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        """Return what each expert is multiplied by, (t,)."""
        norms = np.sqrt(np.diag(gram))
        if norms.size == 1:
            return np.ones(1)
        found = np.zeros(norms.size)
        used = np.flatnonzero(norms > self.tol)
        if not used.size:
            used = np.flatnonzero(norms)
        if not used.size:
            return found
        cosines = gram[np.ix_(used, used)] / np.outer(norms[used], norms[used])
        found[used] = self._mean(cosines) / norms[used] * norms.mean()
        return found

    def _mean(self, cosines: np.ndarray) -> np.ndarray:
        """Return the mean's coefficients in unit vectors that have these inner products."""

        def length(c: np.ndarray) -> float:
            return float(np.sqrt(max(c @ cosines @ c, 0.0)))

        count = len(cosines)
        mean = np.full(count, 1 / count)
        if length(mean) < self.tol:
            mean = np.eye(count)[0]
        mean = mean / length(mean)
        for _ in range(self.max_iter):
            dots = np.clip(cosines @ mean, -1, 1)
            angles = np.arccos(dots)
            pulls = (angles >= self.tol) & (angles <= np.pi - 1e-6)
            pull = np.where(pulls, angles / np.where(pulls, np.sin(angles), 1.0), 0.0) / count
            tangent = pull - (pull @ dots) * mean
            step = length(tangent)
            if step < self.tol:
                break
            mean = np.cos(step) * mean + np.sin(step) / step * tangent
            mean = mean / length(mean)
        return mean

"""Spherical interpolation among many: the direction of the mean unit vector, at the mean length.

Goddard, 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit `multislerp`.
With x_t = theta_t, or theta_t - theta_0 with a base, of norms n_t:

    m      = sum_t w_t x_t / (n_t + eps)                                     (n,)
    merged = [theta_0 +] (sum_t w_t n_t) m / |m|                             (n,)

The source projects the unit vectors to the tangent space at m / |m|, averages them there with the
same weights and maps back. That average is m minus its part along m, which is exactly zero, so the
map only multiplies by cos(eps): what it adds in float32 is rounding noise.

One expert is returned as it is. Where the mean direction vanishes two experts are averaged on the
line, as in mergekit; more are an error. Deviates from mergekit: it vanishes below 1e-7 (there at
`eps`, which float32 does not resolve), tensors of one element are then averaged too, updates that
are all zero give the base (there an error), weights that sum to zero are an error. Two passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float, per_expert
from pluribus.core.errors import InputError
from pluribus.core.fold import Gram, vectors
from pluribus.core.merger import At, PerExpert, Positive, Stage, merger
from pluribus.core.sparse import total_weight, weighted_sum


@merger("multislerp", base="optional")
@dataclass(frozen=True, kw_only=True)
class MultiSlerp:
    """Mean direction, mean length."""

    weight: PerExpert = 1.0
    normalize_weights: bool = True
    eps: Positive = 1e-8

    def folds(self) -> Sequence[Stage]:
        """Ask for the inner products of all that is interpolated."""
        return [{"gram": Gram(of=vectors)}]

    def __call__(
        self,
        base: Float[Array, " n"] | None,
        experts: Float[Array, "t n"],
        *,
        at: At,
        gram: np.ndarray,
    ) -> Float[Array, " n"]:
        """Merge one block. Raises InputError where directions or weights cancel."""
        count = experts.shape[0]
        if count == 1:
            return experts[0]
        merged = weighted_sum(vectors(base, experts), self.coefficients(gram, at))
        return merged if base is None else base + merged

    def coefficients(self, gram: np.ndarray, at: At) -> np.ndarray:
        """Return what each expert, or its update, is multiplied by, (t,).

        Raises InputError where directions or weights cancel.
        """
        count = gram.shape[0]
        weights = np.array(per_expert(self.weight, count))
        if self.normalize_weights:
            weights = weights / total_weight(self.weight, count)
        norms = np.sqrt(np.diag(gram))
        if not norms.any():
            return weights
        inverse = weights / (norms + self.eps)
        length = float(np.sqrt(max(inverse @ gram @ inverse, 0.0)))
        if length >= max(self.eps, 1e-7):
            return inverse / length * (weights @ norms) * np.cos(self.eps)
        if count == 2 or at.size == 1:
            return weights
        raise InputError(
            f"multislerp: the weighted directions of the {count} experts cancel in tensor "
            f"{at.name!r}, so they have no mean direction; change the weights or leave one out"
        )

"""Spherical interpolation between two experts, or between their updates if there is a base.

mergekit `nuslerp`; after Shoemake, SIGGRAPH 1985. With t = w_2 / (w_1 + w_2), and x_i = theta_i, or
theta_i - theta_0 with a base:

    a      = angle between x_1 and x_2
    merged = [theta_0 +] (sin((1 - t) a) x_1 + sin(t a) x_2) / sin(a)         (n,)

and (1 - t) x_1 + t x_2 where sin(a) <= 1e-6. The angle is that of the whole tensor
(`nuslerp_flatten`), or one for each vector along the last axis, or with `nuslerp_row_wise` along
the first: mergekit's name is the reverse of what one expects. Equal to `slerp` but for the
threshold, and for a vector of norm below 1e-7, which is divided by 1e-7.

Deviates from mergekit: weights that cancel (1 and -1) are an error; two zeros mean t = 0.5, as
there. Two passes flattened, one otherwise; `nuslerp_row_wise` needs a whole tensor in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float, namespace, per_expert
from pluribus.core.errors import InputError
from pluribus.core.fold import Gram, vectors
from pluribus.core.merger import Grain, PerExpert, Stage, merger
from pluribus.core.sparse import weighted_sum


@merger("nuslerp", base="optional", experts=(2, 2))
@dataclass(frozen=True, kw_only=True)
class NuSlerp:
    """Interpolate along the arc between two."""

    weight: PerExpert = 1.0
    nuslerp_flatten: bool = True  # one angle for the tensor
    nuslerp_row_wise: bool = False  # angles along the first axis instead of the last

    def check(self) -> None:
        """Raise InputError for weights whose sum says nothing about their ratio."""
        first, second = per_expert(self.weight, 2)
        if abs(first + second) < 1e-6 and (first, second) != (0.0, 0.0):
            raise InputError(
                f"nuslerp: weights {first} and {second} cancel, so their ratio is undefined; "
                "give weights with a sum, such as 0.5 and 0.5"
            )

    @property
    def grain(self) -> Grain:
        """Any elements for one angle, whole rows or tensors for many."""
        if self.nuslerp_flatten:
            return "element"
        return "tensor" if self.nuslerp_row_wise else "row"

    def folds(self) -> Sequence[Stage]:
        """Ask for the inner products of the flattened vectors."""
        return [{"gram": Gram(of=vectors)}] if self.nuslerp_flatten else []

    def __call__(
        self,
        base: Float[Array, "..."] | None,
        experts: Float[Array, "2 ..."],
        *,
        gram: np.ndarray | None = None,
    ) -> Float[Array, "..."]:
        """Merge one block."""
        x = vectors(base, experts)
        if gram is not None:
            merged = weighted_sum(x, self.coefficients(gram))
        else:
            a, b = _coefficients(self._share, _cosines(x, 0 if self.nuslerp_row_wise else -1))
            xp = namespace(x)
            merged = x[0] * xp.astype(a, x.dtype) + x[1] * xp.astype(b, x.dtype)
            merged = merged.reshape(experts.shape[1:])
        return merged if base is None else base + merged

    @property
    def fusible(self) -> bool:
        """Whether one angle holds for the whole tensor."""
        return self.nuslerp_flatten

    @property
    def _share(self) -> float:
        """How far to go from the first to the second."""
        first, second = per_expert(self.weight, 2)
        return 0.5 if first == second == 0 else second / (first + second)

    def coefficients(self, gram: np.ndarray) -> tuple[float, float]:
        """Return what the two vectors are multiplied by."""
        cos = gram[0, 1] / np.prod(np.maximum(np.sqrt(np.diag(gram)), 1e-7))
        a, b = _coefficients(self._share, cos)
        return float(a), float(b)


def _cosines(x: Array, axis: int) -> Array:
    """Cosine between the two vectors at each place along an axis, in float64, of size 1 there."""
    xp = namespace(x)
    one, two = xp.astype(x[0], xp.float64), xp.astype(x[1], xp.float64)
    if one.ndim == 0:
        one, two = one.reshape((1,)), two.reshape((1,))

    def dot(p: Array, q: Array) -> Array:
        return xp.sum(p * q, axis=axis, keepdims=True)

    def norm(p: Array) -> Array:
        return xp.clip(xp.sqrt(dot(p, p)), min=1e-7)

    return dot(one, two) / (norm(one) * norm(two))


def _coefficients(t: float, cos: Array | float) -> tuple[Array, Array]:
    """Return what the two vectors are multiplied by, for each cosine."""
    if not hasattr(cos, "shape"):
        cos = np.asarray(cos)
    xp = namespace(cos)
    cos = xp.clip(cos, -1.0, 1.0)
    straight = 1 - cos * cos <= 1e-12
    angle = xp.acos(xp.where(straight, 0.0, cos))
    sine = xp.sin(angle)
    a = xp.where(straight, 1 - t, xp.sin((1 - t) * angle) / sine)
    b = xp.where(straight, t, xp.sin(t * angle) / sine)
    return a, b

"""Singular values and vectors of task matrices, in float64, for methods that need whole matrices.

A float32 block is widened before its SVD, so that small singular directions, which isotropic
methods treat like large ones, are not rounding noise. Directions at or below `CUT` times the
largest singular value count as absent: LAPACK returns arbitrary vectors for them, and a merge must
not depend on those.
"""

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from pluribus.core.arrays import Array, is_torch
from pluribus.core.merger import At

if TYPE_CHECKING:
    from torch import Tensor

CUT = 1e-6  # float32 task matrices carry rounding noise of about 1e-7 of their largest value


class Svd(NamedTuple):
    """A matrix (r, c) as u @ diag(s) @ vh, without its null space."""

    u: "Tensor"  # (r, k)
    s: "Tensor"  # (k,), falling, all positive
    vh: "Tensor"  # (k, c)


def is_matrix(base: Array, at: At, exclude: tuple[str, ...] = ()) -> bool:
    """Return whether a tensor has rows and columns and its name holds none of `exclude`."""
    return len(base.shape) >= 2 and min(base.shape) > 0 and not any(x in at.name for x in exclude)


def matrices(arrays: Array, axes: int) -> "Tensor":
    """Return an array as float64 torch matrices (..., r, c); `axes` lead, further axes join c."""
    import torch

    whole = cast(
        torch.Tensor,
        arrays if is_torch(arrays) else torch.from_numpy(np.ascontiguousarray(arrays)),
    )
    return whole.reshape(*whole.shape[: axes + 1], -1).to(torch.float64)


def task_matrices(base: Array, experts: Array) -> "Tensor":
    """Return experts - base as float64 matrices (t, r, c)."""
    return matrices(experts, 1) - matrices(base, 0)


def added(base: Array, update: "Tensor") -> Array:
    """Return base + update, rounded once to the kind, type and shape of `base`."""
    merged = (matrices(base, 0) + update).reshape(tuple(base.shape))
    return restored(merged, base)


def restored(values: "Tensor", other: Array) -> Array:
    """Return torch values as an array of the kind and type of `other`."""
    if isinstance(other, np.ndarray):
        return values.numpy().astype(other.dtype)
    return values.to(other.dtype)


def averaged(base: Array, experts: Array, scale: float) -> Array:
    """Return base + scale * mean of task vectors: what these methods do to non-matrices."""
    flat = base.reshape(-1)
    rows = experts.reshape(experts.shape[0], -1)
    total = rows[0] - flat
    for row in rows[1:]:
        total = total + (row - flat)
    return (flat + scale * (total / experts.shape[0])).reshape(base.shape)


def svd(matrix: "Tensor") -> Svd:
    """Return the singular value decomposition over the numerical rank of `matrix`."""
    import torch

    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    k = int((s > CUT * s[0]).sum()) if s.numel() else 0
    return Svd(u[:, :k], s[:k], vh[:k])


def polar(matrix: "Tensor") -> "Tensor":
    """Return the partial isometry nearest to `matrix`: all its singular values set to one."""
    u, _, vh = svd(matrix)
    return u @ vh

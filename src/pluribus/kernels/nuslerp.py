"""Spherical interpolation of two experts or updates: one weighted sum, once the angle is known."""

from typing import Any

import numpy as np

from pluribus.kernels.once import Once
from pluribus.kernels.weighted import weighted

_coefficients = Once(lambda merger, gram: merger.coefficients(gram))


def fused(
    merger: Any,
    base: np.ndarray | None,
    experts: np.ndarray,
    *,
    gram: np.ndarray,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.nuslerp.NuSlerp`."""
    coefficients = np.array(_coefficients(merger, gram))
    among = base is not None
    return weighted(experts, coefficients, out, base=base, minus=among, add=among)

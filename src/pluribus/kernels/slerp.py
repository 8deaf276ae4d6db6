"""Spherical interpolation: one weighted sum, once the angle is known."""

from typing import Any

import numpy as np

from pluribus.kernels.once import Once
from pluribus.kernels.weighted import weighted

_coefficients = Once(lambda merger, gram: merger.coefficients(gram))


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    gram: np.ndarray,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.slerp.Slerp`."""
    a, b = _coefficients(merger, gram)
    return weighted(experts, np.array([b]), out, base=base, lead=a)

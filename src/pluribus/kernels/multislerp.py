"""Spherical interpolation among many: one weighted sum, once its coefficients are known."""

from typing import Any

import numpy as np

from pluribus.core.merger import At
from pluribus.kernels.once import Once
from pluribus.kernels.weighted import weighted

_coefficients = Once(lambda merger, gram, at: merger.coefficients(gram, at))


def fused(
    merger: Any,
    base: np.ndarray | None,
    experts: np.ndarray,
    *,
    at: At,
    gram: np.ndarray,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.multislerp.MultiSlerp`."""
    if experts.shape[0] == 1:
        return weighted(experts, np.ones(1), out)
    among = base is not None
    return weighted(
        experts, _coefficients(merger, gram, at), out, base=base, minus=among, add=among
    )

"""Karcher mean: one weighted sum, once its coefficients are known."""

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
    """See `pluribus.merge.karcher.Karcher`."""
    return weighted(experts, _coefficients(merger, gram), out)

"""Model Stock: one sum of updates, once it is known how far to go."""

from typing import Any

import numpy as np

from pluribus.kernels.once import Once
from pluribus.kernels.weighted import weighted

_share = Once(lambda merger, gram: merger.share(gram))


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    gram: np.ndarray,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.model_stock.ModelStock`."""
    count = experts.shape[0]
    then = (1 / count, _share(merger, gram))
    return weighted(experts, np.ones(count), out, base=base, minus=True, add=True, then=then)

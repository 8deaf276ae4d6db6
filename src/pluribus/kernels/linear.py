"""The weighted average in one pass over each chunk."""

from typing import Any

import numba as nb
import numpy as np

from pluribus.kernels.combine import CHUNK


@nb.njit(nogil=True, cache=True)
def _block(experts, share, out):
    t, n = experts.shape
    total = np.empty(CHUNK, np.float64)
    for low in range(0, n, CHUNK):
        m = min(CHUNK, n - low)
        for i in range(m):
            total[i] = np.float64(experts[0, low + i]) * share[0]
        for j in range(1, t):
            for i in range(m):
                total[i] += np.float64(experts[j, low + i]) * share[j]
        for i in range(m):
            out[low + i] = np.float32(total[i])


def fused(merger: Any, base: np.ndarray | None, experts: np.ndarray, **_: Any) -> np.ndarray:
    """See `pluribus.merge.linear.Linear`."""
    out = np.empty(experts.shape[1], np.float32)
    _block(experts, np.array(merger.shares(experts.shape[0])), out)
    return out

"""The weighted average in one pass over each chunk."""

from typing import Any

import numba as nb
import numpy as np

from pluribus.kernels.combine import CHUNK


@nb.njit(nogil=True, cache=True)
def _block(experts, weight, out):
    t, n = experts.shape
    for low in range(0, n, CHUNK):
        high = min(low + CHUNK, n)
        for i in range(low, high):
            out[i] = experts[0, i] * weight[0]
        for j in range(1, t):
            w = weight[j]
            for i in range(low, high):
                out[i] += experts[j, i] * w


def fused(merger: Any, base: np.ndarray | None, experts: np.ndarray, **_: Any) -> np.ndarray:
    """See `pluribus.merge.linear.Linear`."""
    out = np.empty(experts.shape[1], np.float32)
    _block(experts, merger.shares(experts)[:, 0], out)
    return out

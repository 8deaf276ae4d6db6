"""The weighted average in one pass over each chunk."""

from typing import Any

import numba as nb
import numpy as np

from pluribus.kernels.combine import CHUNK


@nb.njit(nogil=True, cache=True)
def _begin(row, share, total):
    for i in range(row.size):
        total[i] = np.float64(row[i]) * share


@nb.njit(nogil=True, cache=True)
def _add(row, share, total):
    for i in range(row.size):
        total[i] += np.float64(row[i]) * share


@nb.njit(nogil=True, cache=True)
def _round(total, out):
    for i in range(out.size):
        out[i] = np.float32(total[i])


@nb.njit(nogil=True, cache=True)
def _block(experts, share, out):
    t, n = experts.shape
    total = np.empty(CHUNK, np.float64)
    for low in range(0, n, CHUNK):
        high = min(low + CHUNK, n)
        _begin(experts[0, low:high], share[0], total)
        for j in range(1, t):
            _add(experts[j, low:high], share[j], total)
        _round(total, out[low:high])


def fused(merger: Any, base: np.ndarray | None, experts: np.ndarray, **_: Any) -> np.ndarray:
    """See `pluribus.merge.linear.Linear`."""
    out = np.empty(experts.shape[1], np.float32)
    _block(experts, np.array(merger.shares(experts.shape[0])), out)
    return out

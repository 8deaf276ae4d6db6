"""The weighted average in one pass over each chunk."""

from typing import Any

import numpy as np

from pluribus.kernels.chunks import CHUNK, jit, load, space, store


@jit
def _block(experts, share, out):
    t, n = experts.shape
    row = np.empty(CHUNK, np.float32)
    total = np.empty(CHUNK, np.float64)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        for j in range(t):
            load(experts[j, start:stop], row[:m])
            w = share[j]
            if j == 0:
                for i in range(m):
                    total[i] = np.float64(row[i]) * w
            else:
                for i in range(m):
                    total[i] += np.float64(row[i]) * w
        for i in range(m):
            row[i] = np.float32(total[i])
        store(row[:m], out[start:stop])


def fused(
    merger: Any,
    base: np.ndarray | None,
    experts: np.ndarray,
    *,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.linear.Linear`."""
    out = space(experts[0], out)
    _block(experts, np.array(merger.shares(experts.shape[0])), out)
    return out

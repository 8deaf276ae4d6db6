"""The common end of sparse merges in one cache-sized chunk: vote, add up, divide, scale."""

import numba as nb
import numpy as np

CHUNK = 1024


@nb.njit(nogil=True, cache=True)
def finish(b, tau, weight, vote, normalize, whole, default, scale, out):
    """Add weighted updates `tau` (t, m) to `b` (m,) into `out`.

    With `vote` only those count whose sign is the sum's (`default` where it cancels), and
    `normalize` divides by their weights; else by `whole`, the sum of all weights.
    """
    zero, one = np.float32(0), np.float32(1)
    t, m = tau.shape
    kept = np.empty(CHUNK, np.float32)
    for i in range(m):
        kept[i] = tau[0, i]
    for j in range(1, t):
        for i in range(m):
            kept[i] += tau[j, i]
    if not vote:
        if normalize:
            for i in range(m):
                kept[i] = kept[i] / whole
        for i in range(m):
            out[i] = b[i] + scale * kept[i]
        return
    sign = np.empty(CHUNK, np.float32)
    divisor = np.empty(CHUNK, np.float32)
    for i in range(m):
        sign[i] = default if kept[i] == zero else kept[i]
        kept[i] = zero
        divisor[i] = zero
    for j in range(t):
        w = weight[j]
        for i in range(m):
            row = tau[j, i]
            agrees = ((sign[i] > zero) & (row > zero)) | ((sign[i] <= zero) & (row < zero))
            kept[i] += row if agrees else zero
            divisor[i] += w if agrees else zero
    if normalize:
        for i in range(m):
            kept[i] = kept[i] / (one if divisor[i] == zero else divisor[i])
    for i in range(m):
        out[i] = b[i] + scale * kept[i]

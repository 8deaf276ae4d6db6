"""The common end of sparse merges in one chunk: vote, add up, divide, scale."""

import numpy as np

from pluribus.kernels.chunks import CHUNK, jit, store


@jit
def elect(total, default, sign):
    """Fill `sign` with 1 where the sum of a chunk's votes is positive, else -1.

    A sum of zero takes the sign of `default`, and counts as minus if that is zero too.
    """
    zero, one = np.float32(0), np.float32(1)
    tie = one if default > zero else -one
    for i in range(total.size):
        sided = one if total[i] > zero else -one
        sign[i] = tie if total[i] == zero else sided


@jit
def finish(b, tau, first, weight, vote, normalize, whole, default, scale, out):
    """Add weighted updates to `b` (m,) and store the sum in `out`, a chunk.

    The updates are m columns of the contiguous `tau` (t, ...), from `first` on: a slice of it would
    have strides, which do not vectorise.

    With `vote` only those count whose sign is the sum's (`default` where it cancels), and
    `normalize` divides by their weights; else by `whole`, the sum of all weights.
    """
    zero, one = np.float32(0), np.float32(1)
    t, m = tau.shape[0], b.size
    kept = np.empty(CHUNK, np.float32)
    row = tau[0, first : first + m]
    for i in range(m):
        kept[i] = row[i]
    for j in range(1, t):
        row = tau[j, first : first + m]
        for i in range(m):
            kept[i] += row[i]
    if vote:
        sign = np.empty(CHUNK, np.float32)
        divisor = np.empty(CHUNK, np.float32)
        elect(kept[:m], default, sign)
        for i in range(m):
            kept[i] = zero
            divisor[i] = zero
        for j in range(t):
            w = weight[j]
            row = tau[j, first : first + m]
            for i in range(m):
                x = row[i]
                agrees = x * sign[i] > zero
                kept[i] += x if agrees else zero
                divisor[i] += w if agrees else zero
        if normalize:
            for i in range(m):
                kept[i] = kept[i] / (one if divisor[i] == zero else divisor[i])
    elif normalize:
        for i in range(m):
            kept[i] = kept[i] / whole
    for i in range(m):
        kept[i] = b[i] + scale * kept[i]
    store(kept[:m], out)

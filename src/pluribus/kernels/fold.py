"""Counting and summing for folds, one pass each, without the GIL.

Sums run in float64 over sixteen fixed lanes, so that they vectorise and yet always add in the same
order.
"""

import numba as nb
import numpy as np

LANES = 16


@nb.njit(nogil=True, cache=True)
def digits32(values, signed, has_prefix, prefix, prefix_shift, shift, counts):
    """Count 16-bit digits of float32 bit patterns, of those that start with `prefix`.

    Signed patterns are flipped to sort as the floats do, with -0 counted as +0.
    """
    top = np.uint32(0x80000000)
    for i in range(values.size):
        bits = values[i]
        if signed:
            bits = top if bits == top else ~bits if bits & top else bits | top
        if has_prefix and (bits >> prefix_shift) != prefix:
            continue
        counts[(bits >> shift) & np.uint32(0xFFFF)] += 1


@nb.njit(nogil=True, cache=True)
def digits64(values, signed, has_prefix, prefix, prefix_shift, shift, counts):
    """Count 16-bit digits of float64 bit patterns, of those that start with `prefix`."""
    top = np.uint64(0x8000000000000000)
    for i in range(values.size):
        bits = values[i]
        if signed:
            bits = top if bits == top else ~bits if bits & top else bits | top
        if has_prefix and (bits >> prefix_shift) != prefix:
            continue
        counts[(bits >> shift) & np.uint64(0xFFFF)] += 1


@nb.njit(nogil=True, cache=True)
def within32(values, signed, low, high, counts, out):
    """Copy, in order, the bit patterns whose top 16 bits lie in [low, high]; return how many.

    With room in `counts`, count all top digits on the way. `out` needs room for one more than all.
    """
    top = np.uint32(0x80000000)
    counting = counts.size > 0
    count = 0
    for i in range(values.size):
        bits = values[i]
        if signed:
            bits = top if bits == top else ~bits if bits & top else bits | top
        digit = bits >> np.uint32(16)
        if counting:
            counts[digit] += 1
        out[count] = bits  # stored always, kept sometimes: a branch would be mispredicted
        count += np.int64((low <= digit) & (digit <= high))
    return count


@nb.njit(nogil=True, cache=True)
def dot(x, y):
    """Return the float64 dot product of two vectors."""
    lanes = np.zeros(LANES, np.float64)
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += np.float64(x[i + lane]) * np.float64(y[i + lane])
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(whole, x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@nb.njit(nogil=True, cache=True)
def total(x):
    """Return the float64 sum of a vector."""
    lanes = np.zeros(LANES, np.float64)
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += np.float64(x[i + lane])
    out = 0.0
    for lane in range(LANES):
        out += lanes[lane]
    for i in range(whole, x.size):
        out += np.float64(x[i])
    return out

"""Counting and summing for folds, one pass each, without the GIL.

Sums run in float64 over fixed lanes, so that they vectorise and yet always add in the same
order. What works on blocks takes them as float32 or packed (see `kernels.chunks`).
"""

from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pluribus.kernels.chunks import CHUNK, jit, load, load_update, wide

LANES = 256  # a divisor of CHUNK


# -- digits and ranks ------------------------------------------------------------------------------


@jit
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


@jit
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


def _first(typingctx: Any, word: Any) -> Any:
    """Return the number of zero bits below the lowest bit that is set."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), emit


_first_bit = cast(Any, intrinsic(_first))


@jit
def _take(keys, low, high, count, out, flags):
    """Append the keys in [low, high] to the `count` in `out`.

    Returns how many there are now, and how many keys lie above `high`. `flags` are as many bytes as
    there are keys, rounded up to eights; most eights hold none.
    """
    span = np.uint32(high - low)
    above = np.uint32(0)
    m = keys.size
    for i in range(m):
        above += np.uint32(keys[i] > high)
        flags[i] = np.uint8(np.uint32(keys[i] - low) <= span)
    for i in range(m, flags.size):
        flags[i] = 0
    eights = flags.view(np.uint64)
    for k in range(eights.size):
        word = eights[k]
        while word:
            out[count] = keys[8 * k + (_first_bit(word) >> np.uint64(3))]
            count += 1
            word &= word - np.uint64(1)
    return count, np.int64(above)


@jit
def between(values, signed, low, high, above, counts, out):
    """Sort float32 bit patterns (t, n) into above a window, in it, and below.

    Adds how many lie above `high` (t, k) to `above`, and puts those from `low` on into `out`
    (t, k, n), in order, and their numbers into `counts`. Signed patterns are flipped as in
    `digits32`.
    """
    top = np.uint32(0x80000000)
    t, n = values.shape
    k = low.shape[1]
    keys = np.empty(CHUNK, np.uint32)
    flags = np.empty(CHUNK, np.uint8)
    for j in range(t):
        counts[j] = 0
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            m = stop - start
            row = values[j, start:stop]
            for i in range(m):
                bits = row[i]
                flipped = np.uint32(~bits) if bits & top else np.uint32(bits | top)
                keys[i] = (top if bits == top else flipped) if signed else bits
            for c in range(k):
                counts[j, c], more = _take(
                    keys[:m], low[j, c], high[j, c], counts[j, c], out[j, c], flags[: m + -m % 8]
                )
                above[j, c] += more


@jit
def _sizes_as_keys(b, raw, keys):
    for i in range(keys.size):
        delta = np.float32(wide(raw[i]) - b[i])
        keys[i] = np.uint32(delta.view(np.uint32) & np.uint32(0x7FFFFFFF))


@jit
def magnitudes_between(base, experts, low, high, above, counts, out):
    """As `between`, on the absolute updates of a block that need not be written down."""
    t, n = experts.shape
    k = low.shape[1]
    b = np.empty(CHUNK, np.float32)
    keys = np.empty(CHUNK, np.uint32)
    flags = np.empty(CHUNK, np.uint8)
    counts[:] = 0
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        for j in range(t):
            _sizes_as_keys(b[:m], experts[j, start:stop], keys[:m])
            for c in range(k):
                counts[j, c], more = _take(
                    keys[:m], low[j, c], high[j, c], counts[j, c], out[j, c], flags[: m + -m % 8]
                )
                above[j, c] += more


@jit
def magnitudes_of(base, experts, out):
    """Fill `out` (t, n), float32, with the absolute updates of a block."""
    t, n = experts.shape
    b = np.empty(CHUNK, np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        load(base[start:stop], b[: stop - start])
        for j in range(t):
            row = out[j, start:stop]
            load_update(b[: stop - start], experts[j, start:stop], row)
            for i in range(row.size):
                row[i] = abs(row[i])


# -- sums ------------------------------------------------------------------------------------------


@jit
def add_dots(x, y, lanes):
    """Add the products of two float64 chunks to the lanes, but for those that fill no whole row."""
    fours = x.size - x.size % (4 * LANES)
    for i in range(0, fours, 4 * LANES):  # four rows for one look at the lanes, in the same order
        a, b, c, d = x[i:], x[i + LANES :], x[i + 2 * LANES :], x[i + 3 * LANES :]
        e, f, g, h = y[i:], y[i + LANES :], y[i + 2 * LANES :], y[i + 3 * LANES :]
        for k in range(LANES):
            lanes[k] = (((lanes[k] + a[k] * e[k]) + b[k] * f[k]) + c[k] * g[k]) + d[k] * h[k]
    for i in range(fours, x.size - x.size % LANES, LANES):
        a, b = x[i : i + LANES], y[i : i + LANES]
        for lane in range(LANES):
            lanes[lane] += a[lane] * b[lane]


@jit
def gram(base, experts, minus, with_base, out):
    """Fill `out` with the inner products of a block's rows, in the order of sums of `dot`.

    Rows are the experts, less the base if `minus`, after the base itself if `with_base`.
    """
    t, n = experts.shape
    rows = t + 1 if with_base else t
    b = np.empty(CHUNK, np.float32)
    x = np.empty(CHUNK, np.float32)
    wide = np.empty((rows, CHUNK), np.float64)
    lanes = np.zeros((rows, rows, LANES), np.float64)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        first = 0
        if minus or with_base:
            load(base[start:stop], b[:m])
        if with_base:
            first = 1
            row = wide[0]
            for i in range(m):
                row[i] = np.float64(b[i])
        for j in range(t):
            load(experts[j, start:stop], x[:m])
            row = wide[first + j]
            if minus:
                for i in range(m):
                    row[i] = np.float64(x[i] - b[i])
            else:
                for i in range(m):
                    row[i] = np.float64(x[i])
        for j in range(rows):
            for k in range(j + 1):
                add_dots(wide[j, :m], wide[k, :m], lanes[j, k])
    last = n % CHUNK if n % CHUNK else CHUNK
    for j in range(rows):
        for k in range(j + 1):
            total = 0.0
            for lane in range(LANES):
                total += lanes[j, k, lane]
            for i in range(last - n % LANES, last):
                total += wide[j, i] * wide[k, i]
            out[j, k] = total
            out[k, j] = total


@jit
def add_sizes(x, lanes):
    """Add the absolute values of a chunk to the lanes, but for those that fill no whole row."""
    fours = x.size - x.size % (4 * LANES)
    for i in range(0, fours, 4 * LANES):
        a, b, c, d = x[i:], x[i + LANES :], x[i + 2 * LANES :], x[i + 3 * LANES :]
        for k in range(LANES):
            two = (lanes[k] + np.float64(abs(a[k]))) + np.float64(abs(b[k]))
            lanes[k] = (two + np.float64(abs(c[k]))) + np.float64(abs(d[k]))
    for i in range(fours, x.size - x.size % LANES, LANES):
        a = x[i : i + LANES]
        for lane in range(LANES):
            lanes[lane] += np.float64(abs(a[lane]))


@jit
def sum_sizes(lanes, tail):
    """Return the sum of the lanes and of the absolute values that filled no whole row."""
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(tail.size):
        total += np.float64(abs(tail[i]))
    return total


@jit
def close_sizes(lanes, tau, n, out):
    """Fill `out` (t,) with the sums of lanes and of what the last of n elements leave in `tau`."""
    last = n % CHUNK if n % CHUNK else CHUNK
    for j in range(out.size):
        out[j] = sum_sizes(lanes[j], tau[j, last - n % LANES : last])


@jit
def magnitude_sums(base, experts, out):
    """Fill `out` with the sums of absolute updates of a block, as `total` adds them."""
    t, n = experts.shape
    b = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    lanes = np.zeros((t, LANES), np.float64)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        for j in range(t):
            load_update(b[:m], experts[j, start:stop], tau[j, :m])
            add_sizes(tau[j, :m], lanes[j])
    close_sizes(lanes, tau, n, out)


@jit
def dot(x, y):
    """Return the float64 dot product of two vectors."""
    lanes = np.zeros(LANES, np.float64)
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        a, b = x[i : i + LANES], y[i : i + LANES]
        for lane in range(LANES):
            lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(whole, x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@jit
def total(x):
    """Return the float64 sum of a vector."""
    lanes = np.zeros(LANES, np.float64)
    whole = x.size - x.size % LANES
    for i in range(0, whole, LANES):
        a = x[i : i + LANES]
        for lane in range(LANES):
            lanes[lane] += np.float64(a[lane])
    out = 0.0
    for lane in range(LANES):
        out += lanes[lane]
    for i in range(whole, x.size):
        out += np.float64(x[i])
    return out

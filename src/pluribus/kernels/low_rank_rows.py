"""Low-rank updates of a batch whose rows have different parts, one pass over what they add to.

Part by part, four tokens and four ranks at a time, so that what is read takes part in several
products; no row is copied to lie beside others of its part. `route._banks` holds the readable
forms, which are the oracle, and chooses among them and this one by the time each should take: one
thread that begins at once wins where a batch is small, or its rows are shared out unevenly;
batched products on all threads where it is large.
"""

from functools import partial
from typing import Any

import numpy as np

from pluribus.kernels.chunks import jit

sums = partial(jit, fastmath={"reassoc", "contract"})


@sums
def _down4(x0, x1, x2, x3, f0, f1, f2, f3, h):
    """Fill h (4, 4) with the products of four tokens and four rows of a factor."""
    zero = np.float32(0)
    h00, h01, h02, h03 = zero, zero, zero, zero
    h10, h11, h12, h13 = zero, zero, zero, zero
    h20, h21, h22, h23 = zero, zero, zero, zero
    h30, h31, h32, h33 = zero, zero, zero, zero
    for c in range(x0.size):
        p, q, r, s = x0[c], x1[c], x2[c], x3[c]
        d, e, f, g = f0[c], f1[c], f2[c], f3[c]
        h00 += p * d
        h01 += p * e
        h02 += p * f
        h03 += p * g
        h10 += q * d
        h11 += q * e
        h12 += q * f
        h13 += q * g
        h20 += r * d
        h21 += r * e
        h22 += r * f
        h23 += r * g
        h30 += s * d
        h31 += s * e
        h32 += s * f
        h33 += s * g
    h[0, 0], h[0, 1], h[0, 2], h[0, 3] = h00, h01, h02, h03
    h[1, 0], h[1, 1], h[1, 2], h[1, 3] = h10, h11, h12, h13
    h[2, 0], h[2, 1], h[2, 2], h[2, 3] = h20, h21, h22, h23
    h[3, 0], h[3, 1], h[3, 2], h[3, 3] = h30, h31, h32, h33


@sums
def _up4(y0, y1, y2, y3, s0, s1, s2, s3, h):
    """Add to four tokens' outputs four rows of a factor, h (4, 4) times."""
    h00, h01, h02, h03 = h[0, 0], h[0, 1], h[0, 2], h[0, 3]
    h10, h11, h12, h13 = h[1, 0], h[1, 1], h[1, 2], h[1, 3]
    h20, h21, h22, h23 = h[2, 0], h[2, 1], h[2, 2], h[2, 3]
    h30, h31, h32, h33 = h[3, 0], h[3, 1], h[3, 2], h[3, 3]
    for o in range(y0.size):
        d, e, f, g = s0[o], s1[o], s2[o], s3[o]
        y0[o] += h00 * d + h01 * e + h02 * f + h03 * g
        y1[o] += h10 * d + h11 * e + h12 * f + h13 * g
        y2[o] += h20 * d + h21 * e + h22 * f + h23 * g
        y3[o] += h30 * d + h31 * e + h32 * f + h33 * g


@sums
def _down1(x, f0, f1, f2, f3, h):
    """Fill h (4,) with the products of one token and four rows of a factor."""
    zero = np.float32(0)
    h0, h1, h2, h3 = zero, zero, zero, zero
    for c in range(x.size):
        h0 += x[c] * f0[c]
        h1 += x[c] * f1[c]
        h2 += x[c] * f2[c]
        h3 += x[c] * f3[c]
    h[0], h[1], h[2], h[3] = h0, h1, h2, h3


@sums
def _up1(y, s0, s1, s2, s3, s4, s5, s6, s7, h):
    """Add to one token's outputs eight rows of a factor, h (8,) times."""
    h0, h1, h2, h3, h4, h5, h6, h7 = h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]
    for o in range(y.size):
        y[o] += (
            h0 * s0[o]
            + h1 * s1[o]
            + h2 * s2[o]
            + h3 * s3[o]
            + h4 * s4[o]
            + h5 * s5[o]
            + h6 * s6[o]
            + h7 * s7[o]
        )


@sums
def _dot(x, f):
    """Return the product of a token and a row of a factor."""
    total = np.float32(0)
    for c in range(x.size):
        total += x[c] * f[c]
    return total


@sums
def _axpy(y, s, h):
    """Add to a token's outputs one row of a factor."""
    for o in range(y.size):
        y[o] += h * s[o]


@sums
def _token(x, y, first, second, weight, h):
    """Add one part's update to one token."""
    rank = first.shape[0]
    r = 0
    while r + 4 <= rank:
        _down1(x, first[r], first[r + 1], first[r + 2], first[r + 3], h[r : r + 4])
        r += 4
    while r < rank:
        h[r] = _dot(x, first[r])
        r += 1
    for r in range(rank):
        h[r] *= weight
    r = 0
    while r + 8 <= rank:
        s = second[r : r + 8]
        _up1(y, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], h[r : r + 8])
        r += 8
    while r < rank:
        _axpy(y, second[r], h[r])
        r += 1


@sums
def _tokens(x, y, at, first, second, weight, h):
    """Add one part's update to four tokens, those at `at` (4,), `weight` (4,) times."""
    a, b, c, d = at[0], at[1], at[2], at[3]
    rank = first.shape[0]
    r = 0
    while r + 4 <= rank:
        f = first[r : r + 4]
        _down4(x[a], x[b], x[c], x[d], f[0], f[1], f[2], f[3], h)
        for t in range(4):
            for i in range(4):
                h[t, i] *= weight[t]
        s = second[r : r + 4]
        _up4(y[a], y[b], y[c], y[d], s[0], s[1], s[2], s[3], h)
        r += 4
    while r < rank:
        for t in range(4):
            _axpy(y[at[t]], second[r], weight[t] * _dot(x[at[t]], first[r]))
        r += 1


@sums
def _add(x, y, first, second, parts, rows, weights, places):
    """See `add`."""
    one = np.empty(first.shape[1], np.float32)
    four = np.empty((4, 4), np.float32)
    at = np.empty(4, np.int64)
    weight = np.empty(4, np.float32)
    for u in range(parts.size):
        a, b = first[parts[u]], second[parts[u]]
        waiting = 0
        for n in range(rows.shape[1]):
            if weights[u, n] == 0:
                continue
            for place in range(places):
                at[waiting] = rows[u, n] * places + place
                weight[waiting] = weights[u, n]
                waiting += 1
                if waiting == 4:
                    _tokens(x, y, at, a, b, weight, four)
                    waiting = 0
        for t in range(waiting):
            _token(x[at[t]], y[at[t]], a, b, weight[t], one)


def add(
    x: Any, y: Any, first: Any, second: Any, parts: Any, rows: Any, weights: Any, places: int
) -> None:
    """Add w x first_p^T second_p to y at all places of the rows that use part p; all float32.

    x (b places, c), y (b places, R), first (m, r, c), second (m, r, R), contiguous; for each of u
    parts (u,) of int64 the rows (u, n) and their weights (u, n); those of weight 0 are not read.
    """
    _add(x, y, first, second, parts, rows, weights, places)

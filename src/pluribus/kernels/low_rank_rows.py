"""Low-rank updates of a batch whose rows have different parts, one pass over what they add to.

Part by part, four tokens and four ranks at a time, so that what is read takes part in several
products; no row is copied to lie beside others of its part. A team of threads shares the tokens,
or, where a row has several parts, first those and then the columns of what is added to.
`route._banks` holds the readable forms, which are the oracle, and chooses among them and this one
by the time each should take: what begins at once, and copies nothing, wins where a batch is small,
or its rows are shared out unevenly.
"""

from functools import lru_cache, partial
from struct import Struct
from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from pluribus.kernels import team
from pluribus.kernels.chunks import jit

FAST = {"reassoc", "contract"}
ALONE = 60_000  # products up to which one thread is quicker than several
GIVEN = Struct("7q")  # what differs between layers

sums = partial(jit, fastmath=FAST)


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
def _down1(x, f0, f1, f2, f3, f4, f5, f6, f7, h):
    """Fill h (8,) with the products of one token and eight rows of a factor."""
    zero = np.float32(0)
    h0, h1, h2, h3, h4, h5, h6, h7 = zero, zero, zero, zero, zero, zero, zero, zero
    for c in range(x.size):
        v = x[c]
        h0 += v * f0[c]
        h1 += v * f1[c]
        h2 += v * f2[c]
        h3 += v * f3[c]
        h4 += v * f4[c]
        h5 += v * f5[c]
        h6 += v * f6[c]
        h7 += v * f7[c]
    h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7] = h0, h1, h2, h3, h4, h5, h6, h7


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
def _downs(x, first, starts, at, weights, h, low, high):
    """Fill the rows of h (t, r) from low to high: each token's weight times x first_p^T."""
    four = np.empty((4, 4), np.float32)
    rank = first.shape[1]
    for p in range(first.shape[0]):
        f, t, end = first[p], max(low, starts[p]), min(high, starts[p + 1])
        while t + 4 <= end:
            x0, x1, x2, x3 = x[at[t]], x[at[t + 1]], x[at[t + 2]], x[at[t + 3]]
            r = 0
            while r + 4 <= rank:
                _down4(x0, x1, x2, x3, f[r], f[r + 1], f[r + 2], f[r + 3], four)
                for i in range(4):
                    for j in range(4):
                        h[t + i, r + j] = weights[t + i] * four[i, j]
                r += 4
            while r < rank:
                for i in range(4):
                    h[t + i, r] = weights[t + i] * _dot(x[at[t + i]], f[r])
                r += 1
            t += 4
        while t < end:
            own, r = x[at[t]], 0
            while r + 8 <= rank:
                g = f[r : r + 8]
                _down1(own, g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], h[t, r : r + 8])
                r += 8
            while r < rank:
                h[t, r] = _dot(own, f[r])
                r += 1
            for r in range(rank):
                h[t, r] *= weights[t]
            t += 1


@sums
def _ups(y, second, starts, at, h, low, high, left, right):
    """Add h second_p to the tokens from low to high, in the columns from left to right."""
    four = np.empty((4, 4), np.float32)
    rank = second.shape[1]
    for p in range(second.shape[0]):
        s, t, end = second[p], max(low, starts[p]), min(high, starts[p + 1])
        while t + 4 <= end:
            y0, y1 = y[at[t], left:right], y[at[t + 1], left:right]
            y2, y3 = y[at[t + 2], left:right], y[at[t + 3], left:right]
            r = 0
            while r + 4 <= rank:
                for i in range(4):
                    for j in range(4):
                        four[i, j] = h[t + i, r + j]
                s0, s1 = s[r, left:right], s[r + 1, left:right]
                s2, s3 = s[r + 2, left:right], s[r + 3, left:right]
                _up4(y0, y1, y2, y3, s0, s1, s2, s3, four)
                r += 4
            while r < rank:
                for i in range(4):
                    _axpy(y[at[t + i], left:right], s[r, left:right], h[t + i, r])
                r += 1
            t += 4
        while t < end:
            own, r = y[at[t], left:right], 0
            while r + 8 <= rank:
                s0, s1 = s[r, left:right], s[r + 1, left:right]
                s2, s3 = s[r + 2, left:right], s[r + 3, left:right]
                s4, s5 = s[r + 4, left:right], s[r + 5, left:right]
                s6, s7 = s[r + 6, left:right], s[r + 7, left:right]
                _up1(own, s0, s1, s2, s3, s4, s5, s6, s7, h[t, r : r + 8])
                r += 8
            while r < rank:
                _axpy(own, s[r, left:right], h[t, r])
                r += 1
            t += 1


@sums
def _cut(starts, share, among):
    """Return where one of so many shares of the tokens begins: a part's fours stay together."""
    place, p = starts[-1] * share // among, 0
    while p + 2 < starts.size and starts[p + 1] <= place:
        p += 1
    return starts[-1] if share == among else place - (place - starts[p]) % 4


HEAD = 16  # numbers before the tables of a job


def _work(job):
    """See `Updates.add`; the first entry of the job says where it lies."""
    n = carray(job[0], (HEAD,), np.int64)
    tokens, inputs, outputs, parts, rank, used, apart = n[5], n[6], n[7], n[8], n[9], n[10], n[11]
    x = carray(job[1], (tokens, inputs), np.float32)
    y = carray(job[2], (tokens, outputs), np.float32)
    first = carray(job[3], (parts, rank, inputs), np.float32)
    second = carray(job[4], (parts, rank, outputs), np.float32)
    starts = carray(job[12], (parts + 1,), np.int64)
    at = carray(job[13], (used,), np.int64)
    weights = carray(job[14], (used,), np.float32)
    h = carray(job[15], (used, rank), np.float32)
    me, among = team.me(), team.size()
    low, high = _cut(starts, me, among), _cut(starts, me + 1, among)
    _downs(x, first, starts, at, weights, h, low, high)
    if apart:  # no row is another thread's too
        _ups(y, second, starts, at, h, low, high, 0, outputs)
    else:
        team.meet()
        lines = (outputs + 15) // 16  # of a cache; threads write into none together
        left, right = lines * me // among * 16, min(outputs, lines * (me + 1) // among * 16)
        _ups(y, second, starts, at, h, 0, used, left, right)


@lru_cache
def _run() -> Any:
    return team.compiled(_work, fastmath=FAST)


@jit
def counted(table):
    """Count what is not 0 in a table (b, m).

    Returned are the number of entries, of parts that have some, the most that one part has, the
    least and the most that a row has, the first and the last part in use, and whether all entries
    are 1, and whether they go down the rows, one a row.
    """
    rows, parts = table.shape
    entries, used, most, first, last, ones, straight = 0, 0, 0, parts, -1, True, True
    own = np.zeros(rows, np.int64)
    for p in range(parts):
        count = 0
        for i in range(rows):
            if table[i, p] == 0:
                continue
            straight = straight and i == entries
            ones = ones and table[i, p] == 1
            own[i] += 1
            count += 1
            entries += 1
        if count:
            used, most, first, last = used + 1, max(most, count), min(first, p), p
    return entries, used, most, own.min(), own.max(), first, last, ones, straight


@jit
def _job(table, places, rank, used, apart):
    """Return what `_work` reads, in one array: numbers, starts, tokens, weights, and room for h."""
    rows, parts = table.shape
    used *= places
    begin, middle = HEAD + parts + 1, HEAD + parts + 1 + used
    end = middle + (used + 1) // 2
    job = np.empty(end + (used * rank + 1) // 2, np.int64)
    starts, at = job[HEAD:begin], job[begin:middle]
    weights = job[middle:end].view(np.float32)
    t = 0
    for p in range(parts):
        starts[p] = t
        for i in range(rows):
            if table[i, p] == 0:
                continue
            for place in range(places):
                at[t], weights[t] = i * places + place, table[i, p]
                t += 1
    starts[parts] = t
    job[0] = job.ctypes.data
    job[8], job[9], job[10], job[11] = parts, rank, used, apart
    for entry, place in ((12, HEAD), (13, begin), (14, middle), (15, end)):
        job[entry] = job[0] + 8 * place
    return job


class Updates:
    """Which tokens of a batch take which parts, for as many layers as there are.

    `table` (b, m) of float32: the weight of each part in each row, at all `places` of the row;
    `entries` of it are not 0, and `apart` says that no row has two. `rank` is the factors'.
    """

    def __init__(self, table: Any, places: int, rank: int, entries: int, apart: bool) -> None:
        self._job = _job(table, places, rank, entries, apart)
        self._address = self._job[0].item()
        self._tokens, self._products = table.shape[0] * places, entries * places * rank
        self._run = _run()

    def add(
        self, x: int, y: int, first: int, second: int, inputs: int, outputs: int, threads: int
    ) -> None:
        """Add w x first_p^T second_p to y; the first four are addresses of contiguous float32.

        x (b places, c), y (b places, R), first (m, r, c), second (m, r, R); inputs is c, outputs R.
        Factors of parts that no row takes, and rows that take none, are not read.
        """
        GIVEN.pack_into(self._job, 8, x, y, first, second, self._tokens, inputs, outputs)
        few = self._products * (inputs + outputs) <= ALONE
        self._run(self._address, 1 if few else threads, 0)  # 0: no flags

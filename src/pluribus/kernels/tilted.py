"""Passes over a vocabulary that decoding by distances needs: one over memory each.

`compared` makes what two tunings differ by, and how far that is; `sums` tilts a distribution
further and further along a direction:

    z[n] = sum_v p_v exp((first + n gap) d_v)        m[n] = sum_v p_v exp((first + n gap) d_v) d_v

`moments` are those of the direction under a tilted distribution. A stretch of the vocabulary stays
in the first cache while all n are gone through, each made from the one before by a multiplication.
Rows are (rows, vocabulary), float32.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np

from pluribus.kernels.chunks import CHUNK, jit

_summing = partial(jit, fastmath={"reassoc", "contract"})  # in another order: sums vectorise
_TURNS = np.float32(1.4426950408889634)  # 1 / ln 2
_MAGIC = np.float32(12582912.0)  # 1.5 x 2^23: adding it rounds to a whole number
_HIGH, _LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2 in two parts


@jit
def exponentials(x, out):
    """Fill `out` with exp(x), to about two units in the last place; below -87 it is 0.

    The exponent is split in a power of 2 and a rest, whose series has six terms (Cephes' expf).
    """
    power = np.empty(CHUNK, np.float32)[: x.size]
    for i in range(x.size):
        power[i] = min(max(x[i], np.float32(-87.0)), np.float32(88.0)) * _TURNS + _MAGIC
    bits = power.view(np.int32)
    for i in range(x.size):
        whole = power[i] - _MAGIC
        r = (x[i] - whole * _HIGH) - whole * _LOW
        s = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        s = s * r + np.float32(8.3334519073e-3)
        s = s * r + np.float32(4.1665795894e-2)
        s = s * r + np.float32(1.6666665459e-1)
        s = s * r + np.float32(5.0000001201e-1)
        s = s * (r * r) + r + np.float32(1.0)
        scale = np.int32((bits[i] + np.int32(127)) << np.int32(23)).view(np.float32)
        out[i] = s * scale if x[i] >= np.float32(-87.0) else np.float32(0.0)


@_summing
def _weighed(x, largest, out):
    """Fill `out` with exp(x - largest), and return its sum and that of x, which NaN shows in."""
    moved = np.empty(CHUNK, np.float32)
    z = total = 0.0
    for low in range(0, x.size, CHUNK):
        some, own = x[low : low + CHUNK], out[low : low + CHUNK]
        less = moved[: some.size]
        for i in range(some.size):
            less[i] = some[i] - largest
        exponentials(less, own)
        part = whole = np.float32(0)
        for i in range(some.size):
            part += own[i]
            whole += some[i]
        z += part
        total += whole
    return z, total


@jit
def _ends(x):
    """Return the least and the largest: of every place in a chunk first, which vectorises."""
    least, most = np.full(CHUNK, x[0]), np.full(CHUNK, x[0])
    for low in range(0, x.size, CHUNK):
        some = x[low : low + CHUNK]
        for i in range(some.size):
            least[i] = some[i] if some[i] < least[i] else least[i]
            most[i] = some[i] if some[i] > most[i] else most[i]
    return least.min(), most.max()


@_summing
def _compared(large, base, tuned, p, delta, out):
    q, t = np.empty(large.shape[1], np.float32), np.empty(large.shape[1], np.float32)
    for row in range(len(large)):
        of_p, of_q, of_t = large[row], base[row], tuned[row]
        own, d, told, far = p[row], delta[row], out[row], np.zeros(CHUNK, np.float32)
        (least_p, most_p), (_, most_q), (_, most_t) = _ends(of_p), _ends(of_q), _ends(of_t)
        z_p, total_p = _weighed(of_p, most_p, own)
        z_q, total_q = _weighed(of_q, most_q, q)
        z_t, total_t = _weighed(of_t, most_t, t)
        log_p = most_p + math.log(z_p)
        apart = (most_t - most_q) + (math.log(z_t) - math.log(z_q))
        away, share = np.float32(apart), np.float32(1 / z_p)
        for low in range(0, own.size, CHUNK):
            high = min(own.size, low + CHUNK)
            x_q, x_t, some_d, some_p = of_q[low:high], of_t[low:high], d[low:high], own[low:high]
            some_q, some_t = q[low:high], t[low:high]
            mean = there = back = np.float32(0)
            for i in range(some_d.size):
                gap = (x_t[i] - x_q[i]) - away
                some_d[i] = gap
                some_p[i] *= share
                mean += some_p[i] * gap
                there += some_t[i] * gap
                back -= some_q[i] * gap
                far[i] = abs(gap) if abs(gap) > far[i] else far[i]
            told[0] += mean
            told[1] += there
            told[2] += back
        told[1] /= z_t
        told[2] /= z_q
        told[4] = far.max()
        told[3] = least_p - log_p
        told[5] = log_p
        told[6] = total_p + total_q + total_t


@jit
def _factors(d, c, scaled, out):
    """Fill `out` with exp(c d)."""
    for i in range(d.size):
        scaled[i] = c * d[i]
    exponentials(scaled, out)


@_summing
def _sums(p, delta, first, gap, out):
    x, f = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    g = np.empty(CHUNK, np.float32)
    rows, size = p.shape
    for row in range(rows):
        for low in range(0, size, CHUNK):
            high = min(size, low + CHUNK)
            own, d = p[row, low:high], delta[row, low:high]
            now, begun, further = x[: high - low], f[: high - low], g[: high - low]
            _factors(d, first[row], now, begun)
            _factors(d, gap[row], now, further)
            for i in range(d.size):
                now[i] = own[i] * begun[i]
            for n in range(out.shape[1]):
                z = np.float32(0)
                m = np.float32(0)
                for i in range(d.size):
                    z += now[i]
                    m += now[i] * d[i]
                    now[i] *= further[i]
                out[row, n, 0] += z
                out[row, n, 1] += m


@_summing
def _moments(p, delta, at, out):
    x, f = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    rows, size = p.shape
    for row in range(rows):
        for low in range(0, size, CHUNK):
            high = min(size, low + CHUNK)
            own, d = p[row, low:high], delta[row, low:high]
            now, tilt = x[: high - low], f[: high - low]
            _factors(d, at[row], now, tilt)
            for i in range(d.size):
                now[i] = own[i] * tilt[i]
            for k in range(out.shape[1]):
                total = np.float32(0)
                for i in range(d.size):
                    total += now[i]
                    now[i] *= d[i]
                out[row, k] += total


def compared(
    large: np.ndarray, base: np.ndarray, tuned: np.ndarray, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return P, D = log(tuned / base), and for every row seven numbers, of three models' logits.

    The numbers are E_P[D], KL(tuned || base), KL(base || tuned), the least log P, the largest |D|,
    the logarithm of what P is normalised by, and one that is finite if all logits are.
    """
    p, delta = np.empty_like(large), np.empty_like(large)
    out = np.zeros((len(large), 7))
    _by_rows(_compared, threads, large, base, tuned, p, delta, out)
    return p, delta, out


def sums(
    p: np.ndarray,
    delta: np.ndarray,
    first: np.ndarray,
    gap: np.ndarray,
    count: int,
    threads: int = 1,
) -> np.ndarray:
    """Return both sums, (rows, count, 2) in float64; `first` and `gap` are of each row."""
    out = np.zeros((len(p), count, 2))
    _by_rows(_sums, threads, p, delta, first, gap, out)
    return out


def moments(
    p: np.ndarray, delta: np.ndarray, at: np.ndarray, count: int, threads: int = 1
) -> np.ndarray:
    """Return sum_v p_v exp(at d_v) d_v^k for k below `count`, (rows, count) in float64."""
    out = np.zeros((len(p), count))
    _by_rows(_moments, threads, p, delta, at, out)
    return out


def _by_rows(kernel: Any, threads: int, *arrays: np.ndarray) -> None:
    """Run a kernel on parts of the rows side by side, the first in this thread."""
    rows = len(arrays[0])
    size = -(-rows // max(1, min(threads, rows)))
    parts = [[x[low : low + size] for x in arrays] for low in range(0, rows, size)]
    others = [_helpers(threads).submit(kernel, *part) for part in parts[1:]]
    kernel(*parts[0])
    for other in others:
        other.result()


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="tilted")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has none of the threads

"""TIES on one block in one pass: trim, vote and average in chunks that stay in the first cache."""

from typing import Any

import numba as nb
import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.fold import Ranked, Selection
from pluribus.core.merger import At

CHUNK = 1024
ALL = np.iinfo(np.int64).max
MEAN, SUM, MAX = 0, 1, 2


@nb.njit(nogil=True, cache=True)
def _keep(base, expert, weight, cut, spare, tau):
    """Fill `tau` with the trimmed, weighted update of one chunk; return how many ties are left.

    Elements equal to the cut are kept in order while `spare` lasts.
    """
    zero = np.float32(0)
    n = base.size
    equal = 0
    if spare != ALL:
        for i in range(n):
            equal += np.int64(abs(expert[i] - base[i]) == cut)
    if spare == ALL or equal == 0 or equal <= spare:
        for i in range(n):
            delta = expert[i] - base[i]
            tau[i] = delta * weight if abs(delta) >= cut else zero
        return spare if spare == ALL else spare - equal
    if spare == 0:
        for i in range(n):
            delta = expert[i] - base[i]
            tau[i] = delta * weight if abs(delta) > cut else zero
        return spare
    for i in range(n):
        delta = expert[i] - base[i]
        size = abs(delta)
        keep = size > cut
        if size == cut and spare > 0:
            keep = True
            spare -= 1
        tau[i] = delta * weight if keep else zero
    return spare


@nb.njit(nogil=True, cache=True)
def _block(base, experts, weight, cut, spare, default, scale, agg, out):
    t, n = experts.shape
    zero, one = np.float32(0), np.float32(1)
    tau = np.empty((t, CHUNK), np.float32)
    total = np.empty(CHUNK, np.float32)
    kept = np.empty(CHUNK, np.float32)
    divisor = np.empty(CHUNK, np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        b = base[start:stop]
        for j in range(t):
            spare[j] = _keep(b, experts[j, start:stop], weight[j], cut[j], spare[j], tau[j, :m])
        for i in range(m):
            total[i] = tau[0, i]
            kept[i] = zero
            divisor[i] = zero
        for j in range(1, t):
            for i in range(m):
                total[i] += tau[j, i]
        for i in range(m):  # the elected sign; a vote that cancels takes the default
            total[i] = default if total[i] == zero else total[i]
        for j in range(t):
            w = weight[j]
            for i in range(m):
                row = tau[j, i]
                plus = (total[i] > zero) & (row > zero)
                minus = (total[i] <= zero) & (row < zero)
                vote = plus | minus
                value = row if vote else zero
                if agg == MAX:
                    kept[i] = max(kept[i], abs(value))
                else:
                    kept[i] += value
                divisor[i] += w if vote else zero
        if agg == MEAN:
            for i in range(m):
                kept[i] = kept[i] / (one if divisor[i] == zero else divisor[i])
        elif agg == MAX:
            for i in range(m):
                kept[i] = kept[i] if total[i] > zero else (-kept[i] if total[i] < zero else zero)
        for i in range(m):
            out[start + i] = b[i] + scale * kept[i]


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    trim: Selection | Ranked,
    majority: Any = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.ties.Ties`."""
    t = experts.shape[0]
    if isinstance(trim, Selection):
        cut, spare = trim.cut(), trim.spare(at)
    else:
        cut, spare = trim.values[:, 0], np.full(t, ALL)
    default = 1.0 if majority is None else float(np.sign(majority[0]))
    agg = {"mean": MEAN if merger.normalize else SUM, "sum": SUM, "max": MAX}[merger.agg]
    out = np.empty_like(base)
    _block(
        base,
        experts,
        np.array(per_expert(merger.weight, t), np.float32),
        cut.astype(np.float32),
        spare.astype(np.int64),
        np.float32(default),
        np.float32(merger.scale),
        agg,
        out,
    )
    return out

"""TIES on one block in one pass: trim, vote and average in chunks that stay in the first cache."""

from typing import Any

import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.merger import At
from pluribus.core.order import Ranked, Selection
from pluribus.kernels.chunks import CHUNK, jit, load, load_update, space, store
from pluribus.kernels.combine import elect

ALL = np.iinfo(np.int64).max
MEAN, SUM, MAX = 0, 1, 2


@jit
def keep(tau, weight, cut, spare):
    """Trim and weigh the updates of one chunk; return how many ties are left.

    Elements equal to the cut are kept in order while `spare` lasts.
    """
    zero = np.float32(0)
    n = tau.size
    equal = 0
    if spare != ALL:
        tied = np.uint32(0)
        for i in range(n):
            tied += np.uint32(abs(tau[i]) == cut)
        equal = np.int64(tied)
    if spare == ALL or equal <= spare:
        for i in range(n):
            tau[i] = tau[i] * weight if abs(tau[i]) >= cut else zero
        return spare if spare == ALL else spare - equal
    if spare == 0:
        for i in range(n):
            tau[i] = tau[i] * weight if abs(tau[i]) > cut else zero
        return spare
    for i in range(n):
        size = abs(tau[i])
        stays = size > cut
        if size == cut and spare > 0:
            stays = True
            spare -= 1
        tau[i] = tau[i] * weight if stays else zero
    return spare


@jit
def _block(base, experts, weight, cut, spare, default, scale, agg, out):
    t, n = experts.shape
    zero, one = np.float32(0), np.float32(1)
    b = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    total = np.empty(CHUNK, np.float32)
    kept = np.empty(CHUNK, np.float32)
    divisor = np.empty(CHUNK, np.float32)
    sign = np.empty(CHUNK, np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        for j in range(t):
            row = tau[j, :m]
            load_update(b[:m], experts[j, start:stop], row)
            spare[j] = keep(row, weight[j], cut[j], spare[j])
            if j == 0:
                for i in range(m):
                    total[i] = row[i]
            else:
                for i in range(m):
                    total[i] += row[i]
        elect(total[:m], default, sign)
        for i in range(m):
            kept[i] = zero
            divisor[i] = zero
        for j in range(t):
            w = weight[j]
            row = tau[j, :m]
            if agg == MAX:
                for i in range(m):
                    size = row[i] * sign[i]
                    kept[i] = size if size > kept[i] else kept[i]
            else:
                for i in range(m):
                    x = row[i]
                    agrees = x * sign[i] > zero
                    kept[i] += x if agrees else zero
                    divisor[i] += w if agrees else zero
        if agg == MEAN:
            for i in range(m):
                kept[i] = kept[i] / (one if divisor[i] == zero else divisor[i])
        elif agg == MAX:
            for i in range(m):  # where votes cancel and nothing breaks the tie, nothing is added
                none = zero if default == zero else kept[i] * sign[i]
                kept[i] = none if total[i] == zero else kept[i] * sign[i]
        for i in range(m):
            kept[i] = b[i] + scale * kept[i]
        store(kept[:m], out[start:stop])


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    trim: Selection | Ranked,
    majority: Any = None,
    out: np.ndarray | None = None,
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
    out = space(base, out)
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

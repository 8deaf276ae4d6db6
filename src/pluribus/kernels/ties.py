"""TIES on one block in one pass: trim, vote and average in chunks that stay in the first cache."""

from typing import Any

import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.merger import At
from pluribus.core.order import Ranked, Selection
from pluribus.kernels.chunks import CHUNK, jit, load, space, store, wide
from pluribus.kernels.combine import elect
from pluribus.kernels.once import Once

ALL = np.iinfo(np.int64).max
MEAN, SUM, MAX = 0, 1, 2


@jit
def _trim(b, raw, weight, cut, tau):
    """Fill `tau` with a chunk's trimmed, weighted updates; return how many equal the cut."""
    zero = np.float32(0)
    tied = np.uint32(0)
    for i in range(tau.size):
        delta = np.float32(wide(raw[i]) - b[i])
        size = abs(delta)
        tied += np.uint32(size == cut)
        tau[i] = delta * weight if size >= cut else zero
    return np.int64(tied)


@jit
def _drop_ties(b, raw, cut, spare, tau):
    """Clear the elements that equal the cut, but for the first `spare`."""
    zero = np.float32(0)
    for i in range(tau.size):
        if abs(np.float32(wide(raw[i]) - b[i])) == cut:
            if spare > 0:
                spare -= 1
            else:
                tau[i] = zero


@jit
def _block(base, experts, weight, cut, beyond, spare, default, scale, agg, out):
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
            least = beyond[j] if spare[j] == 0 else cut[j]
            tied = _trim(b[:m], experts[j, start:stop], weight[j], least, row)
            if 0 < spare[j] < ALL:
                if tied > spare[j]:
                    _drop_ties(b[:m], experts[j, start:stop], cut[j], spare[j], row)
                spare[j] = max(spare[j] - tied, 0)
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


def _found(merger: Any, trim: Selection | Ranked, count: int) -> tuple[np.ndarray, ...]:
    """Return the weights, the cuts and the numbers next above them, float32 (t,) each."""
    cut = trim.cut() if isinstance(trim, Selection) else trim.values[:, 0]
    cut = cut.astype(np.float32)
    weight = np.array(per_expert(merger.weight, count), np.float32)
    return weight, cut, np.nextafter(cut, np.float32(np.inf))


_ends = Once(_found)


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
    weight, cut, beyond = _ends(merger, trim, experts.shape[0])
    spare = trim.spare(at) if isinstance(trim, Selection) else np.full(cut.size, ALL)
    default = 1.0 if majority is None else float(np.sign(majority[0]))
    agg = {"mean": MEAN if merger.normalize else SUM, "sum": SUM, "max": MAX}[merger.agg]
    out = space(base, out)
    _block(
        base,
        experts,
        weight,
        cut,
        beyond,
        spare.astype(np.int64),
        np.float32(default),
        np.float32(merger.scale),
        agg,
        out,
    )
    return out

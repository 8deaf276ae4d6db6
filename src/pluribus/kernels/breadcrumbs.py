"""Breadcrumbs on one block in one pass: keep a band of magnitudes, add (or vote)."""

from typing import Any

import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.fold import Summed
from pluribus.core.merger import At
from pluribus.core.order import Selection
from pluribus.core.sparse import l1_factors, total_weight
from pluribus.kernels.chunks import CHUNK, jit, load, load_update, space
from pluribus.kernels.combine import finish
from pluribus.kernels.fold import LANES, add_sizes, close_sizes

ALL = np.iinfo(np.int64).max


@jit
def _band(tau, low, low_spare, high, high_spare):
    """Clear `tau` above `high` (left out) and below `low`; return the ties that are left.

    Each end is the cut and the next number above it: where no ties are left to take, a band begins
    and ends beyond the cut.
    """
    zero = np.float32(0)
    bottom = low[1] if low_spare == 0 else low[0]
    top = high[1] if high_spare == 0 else high[0]
    low_ties, high_ties = np.uint32(0), np.uint32(0)
    if 0 < low_spare < ALL or 0 < high_spare < ALL:
        for i in range(tau.size):
            low_ties += np.uint32(abs(tau[i]) == low[0])
            high_ties += np.uint32(abs(tau[i]) == high[0])
    from_low = low_spare in (0, ALL) or np.int64(low_ties) <= low_spare
    from_high = high_spare in (0, ALL) or np.int64(high_ties) <= high_spare
    if from_low and from_high:  # all ties at an end are on the same side of it
        for i in range(tau.size):
            size = abs(tau[i])
            tau[i] = tau[i] if size >= bottom and size < top else zero
        if 0 < low_spare < ALL:
            low_spare -= np.int64(low_ties)
        if 0 < high_spare < ALL:
            high_spare -= np.int64(high_ties)
        return low_spare, high_spare
    for i in range(tau.size):
        size = abs(tau[i])
        reached = size > low[0] or (size == low[0] and low_spare > 0)
        if size == low[0] and low_spare > 0 and low_spare != ALL:
            low_spare -= 1
        begun = size > high[0] or (size == high[0] and high_spare > 0)
        if size == high[0] and high_spare > 0 and high_spare != ALL:
            high_spare -= 1
        tau[i] = tau[i] if reached and not begun else zero
    return low_spare, high_spare


@jit
def _block(
    base, experts, low, low_spare, high, high_spare, factor, weight, vote, normalize, whole, scale,
    out,
):  # fmt: skip
    t, n = experts.shape
    one = np.float32(1)
    b = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        for j in range(t):
            row = tau[j, :m]
            load_update(b[:m], experts[j, start:stop], row)
            low_spare[j], high_spare[j] = _band(row, low[j], low_spare[j], high[j], high_spare[j])
            f, w = factor[j], weight[j]
            for i in range(m):
                row[i] = row[i] * f * w
        finish(b[:m], tau, 0, weight, vote, normalize, whole, one, scale, out[start:stop])


@jit
def _kept(base, experts, low, low_spare, high, high_spare, out):
    """Fill `out` with the L1 norms of the bands of one block."""
    t, n = experts.shape
    b = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    lanes = np.zeros((t, LANES), np.float64)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        for j in range(t):
            row = tau[j, :m]
            load_update(b[:m], experts[j, start:stop], row)
            low_spare[j], high_spare[j] = _band(row, low[j], low_spare[j], high[j], high_spare[j])
            add_sizes(row, lanes[j])
    close_sizes(lanes, tau, n, out)


def _ends(ends: Selection, at: At) -> tuple[np.ndarray, ...]:
    found = []
    for column in (0, 1):
        cut = ends.cut(column).astype(np.float32)
        spare = ends.spare(at, column).astype(np.int64)
        found += [np.stack([cut, np.nextafter(cut, np.float32(np.inf))], 1), spare]
    return tuple(found)


def _after(
    merger: Any, base: np.ndarray, experts: np.ndarray, *, at: At, ends: Selection, **_: Any
) -> Summed:
    """Return the L1 norms of what stays."""
    sums = np.empty(experts.shape[0])
    _kept(base, experts, *_ends(ends, at), sums)
    return Summed(sums)


values = {"after": _after}


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    ends: Selection,
    before: np.ndarray | None = None,
    after: np.ndarray | None = None,
    out: np.ndarray | None = None,
    vote: bool = False,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.breadcrumbs.Breadcrumbs`."""
    t = experts.shape[0]
    factor = np.ones(t, np.float32)
    if before is not None and after is not None:
        factor = np.array(l1_factors(before, after), np.float32)
    whole = total_weight(merger.weight, t) if merger.normalize and not vote else 1.0
    out = space(base, out)
    low, low_spare, high, high_spare = _ends(ends, at)
    _block(
        base,
        experts,
        low,
        low_spare,
        high,
        high_spare,
        factor,
        np.array(per_expert(merger.weight, t), np.float32),
        vote,
        merger.normalize,
        np.float32(whole),
        np.float32(merger.scale),
        out,
    )
    return out

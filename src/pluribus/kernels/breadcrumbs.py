"""Breadcrumbs on one block in one pass: keep a band of magnitudes, add (or vote).

Only where ties at a cut need no counting or are counted in place order, as the readable form does.
"""

from typing import Any

import numba as nb
import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.fold import Selection, Summed
from pluribus.core.merger import At
from pluribus.core.sparse import l1_factors, total_weight
from pluribus.kernels.combine import CHUNK, finish
from pluribus.kernels.dare_linear import sizes

ALL = np.iinfo(np.int64).max


@nb.njit(nogil=True, cache=True)
def _band(base, expert, low, low_spare, high, high_spare, tau):
    """Fill `tau` with the updates from `high` (left out) down to `low`; return the ties left."""
    zero = np.float32(0)
    n = base.size
    tied = 0
    for i in range(n):
        size = abs(expert[i] - base[i])
        tied += np.int64((size == low) & (low_spare != ALL))
        tied += np.int64((size == high) & (high_spare != ALL))
    if tied == 0:
        for i in range(n):
            delta = expert[i] - base[i]
            size = abs(delta)
            tau[i] = delta if (size >= low) & (size < high) else zero
        return low_spare, high_spare
    for i in range(n):
        delta = expert[i] - base[i]
        size = abs(delta)
        reached = size > low or (size == low and low_spare > 0)
        if size == low and low_spare > 0 and low_spare != ALL:
            low_spare -= 1
        begun = size > high or (size == high and high_spare > 0)
        if size == high and high_spare > 0 and high_spare != ALL:
            high_spare -= 1
        tau[i] = delta if reached and not begun else zero
    return low_spare, high_spare


@nb.njit(nogil=True, cache=True)
def _block(
    base, experts, low, low_spare, high, high_spare, factor, weight, vote, normalize, whole, scale,
    out,
):  # fmt: skip
    t, n = experts.shape
    one = np.float32(1)
    tau = np.empty((t, CHUNK), np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        for j in range(t):
            low_spare[j], high_spare[j] = _band(
                base[start:stop], experts[j, start:stop], low[j], low_spare[j], high[j],
                high_spare[j], tau[j, :m],
            )  # fmt: skip
            for i in range(m):
                tau[j, i] = tau[j, i] * factor[j] * weight[j]
        finish(
            base[start:stop], tau[:, :m], weight, vote, normalize, whole, one, scale,
            out[start:stop],
        )  # fmt: skip


@nb.njit(nogil=True, cache=True)
def _kept(base, expert, low, low_spare, high, high_spare):
    """Return the L1 norm of a band of one block."""
    tau = np.empty(CHUNK, np.float32)
    total = 0.0
    for start in range(0, base.size, CHUNK):
        stop = min(start + CHUNK, base.size)
        low_spare, high_spare = _band(
            base[start:stop], expert[start:stop], low, low_spare, high, high_spare,
            tau[: stop - start],
        )  # fmt: skip
        for i in range(stop - start):
            total += np.float64(abs(tau[i]))
    return total


def _ends(ends: Selection, at: At) -> tuple[np.ndarray, ...]:
    found = []
    for column in (0, 1):
        cut = ends.cut(column).astype(np.float32)
        spare = ends.spare(at, column).astype(np.int64)
        found += [cut, spare]
    return tuple(found)


def values(
    merger: Any,
    name: str,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    ends: Selection | None = None,
    **_: Any,
) -> Summed | None:
    """Return the L1 norms before or after sparsifying."""
    if name == "before":
        return sizes(base, experts)
    if name != "after" or ends is None:
        return None
    low, low_spare, high, high_spare = _ends(ends, at)
    return Summed(
        np.array(
            [
                _kept(base, row, low[j], low_spare[j], high[j], high_spare[j])
                for j, row in enumerate(experts)
            ]
        )
    )


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    ends: Selection | None = None,
    before: np.ndarray | None = None,
    after: np.ndarray | None = None,
    vote: bool = False,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.breadcrumbs.Breadcrumbs`."""
    if ends is None:  # bands of rows: the readable form sorts them
        return merger(base, experts, at=at, before=before, after=after)
    t = experts.shape[0]
    factor = np.ones(t, np.float32)
    if before is not None and after is not None:
        factor = np.array(l1_factors(before, after), np.float32)
    whole = total_weight(merger.weight, t) if merger.normalize and not vote else 1.0
    out = np.empty_like(base)
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

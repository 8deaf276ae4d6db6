"""DARE on one block in one pass: draw, drop, rescale, add (with `dare_ties`: vote)."""

from typing import Any

import numba as nb
import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.fold import Summed
from pluribus.core.merger import At
from pluribus.core.random import draw, key
from pluribus.core.sparse import l1_factors, total_weight
from pluribus.kernels.combine import CHUNK, finish
from pluribus.kernels.fold import LANES


@nb.njit(nogil=True, cache=True)
def _survivors(base, expert, stream, start, density):
    lanes = np.zeros(LANES, np.float64)
    n = base.size
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            keep = draw(stream, start + np.uint64(i + lane)) < density
            size = abs(expert[i + lane] - base[i + lane])
            lanes[lane] += np.float64(size) if keep else 0.0
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(whole, n):
        if draw(stream, start + np.uint64(i)) < density:
            total += np.float64(abs(expert[i] - base[i]))
    return total


@nb.njit(nogil=True, cache=True)
def _sizes(base, expert):
    lanes = np.zeros(LANES, np.float64)
    n = base.size
    whole = n - n % LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += np.float64(abs(expert[i + lane] - base[i + lane]))
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(whole, n):
        total += np.float64(abs(expert[i] - base[i]))
    return total


@nb.njit(nogil=True, cache=True)
def _block(
    base,
    experts,
    streams,
    start,
    density,
    factor,
    divide,
    weight,
    vote,
    normalize,
    whole,
    scale,
    out,
):
    t, n = experts.shape
    zero, one = np.float32(0), np.float32(1)
    tau = np.empty((t, CHUNK), np.float32)
    for low in range(0, n, CHUNK):
        high = min(low + CHUNK, n)
        for j in range(t):
            for i in range(low, high):
                keep = draw(streams[j], start + np.uint64(i)) < density[j]
                delta = experts[j, i] - base[i]
                tau[j, i - low] = delta if keep else zero
            if divide:
                for i in range(high - low):
                    tau[j, i] = tau[j, i] / factor[j] * weight[j]
            else:
                for i in range(high - low):
                    tau[j, i] = tau[j, i] * factor[j] * weight[j]
        m = high - low
        finish(
            base[low:high], tau[:, :m], weight, vote, normalize, whole, one, scale, out[low:high]
        )


def sizes(base: np.ndarray, experts: np.ndarray) -> Summed:
    """Return the L1 norms of a block's task vectors."""
    flat = base.reshape(-1)
    rows = experts.reshape(experts.shape[0], -1)
    return Summed(np.array([_sizes(flat, row) for row in rows]))


def values(
    merger: Any, name: str, base: np.ndarray, experts: np.ndarray, *, at: At, **_: Any
) -> Summed | None:
    """Return the L1 norms before or after dropping."""
    if name == "before":
        return sizes(base, experts)
    density = per_expert(merger.density, experts.shape[0])
    return Summed(
        np.array(
            [
                _survivors(
                    base,
                    row,
                    np.uint64(key(at.seed, at.name, j)),
                    np.uint64(at.start),
                    np.float32(density[j]),
                )
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
    before: np.ndarray | None = None,
    after: np.ndarray | None = None,
    vote: bool = False,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.dare_linear.DareLinear`."""
    t = experts.shape[0]
    density = np.array(per_expert(merger.density, t), np.float32)
    factor, divide = np.ones(t, np.float32), False
    if before is not None and after is not None:
        factor = np.array(l1_factors(before, after), np.float32)
    elif merger.rescale:
        factor, divide = density, True
    whole = total_weight(merger.weight, t) if merger.normalize and not vote else 1.0
    out = np.empty_like(base)
    _block(
        base,
        experts,
        np.array([key(at.seed, at.name, j) for j in range(t)], np.uint64),
        np.uint64(at.start),
        density,
        factor,
        divide,
        np.array(per_expert(merger.weight, t), np.float32),
        vote,
        merger.normalize,
        np.float32(whole),
        np.float32(merger.scale),
        out,
    )
    return out

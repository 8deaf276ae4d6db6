"""DARE on one block in one pass: draw, drop, rescale, add (with `dare_ties`: vote)."""

import math
from typing import Any

import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.fold import Summed
from pluribus.core.merger import At
from pluribus.core.random import key
from pluribus.core.sparse import l1_factors, total_weight
from pluribus.kernels.chunks import CHUNK, jit, load, load_update, space
from pluribus.kernels.combine import finish
from pluribus.kernels.draws import numbers
from pluribus.kernels.fold import LANES, add_sizes, close_sizes


@jit
def _drop(tau, stream, start, chance, drawn):
    """Clear the elements whose draw, as a whole number below 2^24, is not below `chance`."""
    zero = np.float32(0)
    numbers(stream, start, drawn)
    for i in range(tau.size):
        tau[i] = tau[i] if drawn[i] < chance else zero


@jit
def _survivors(base, experts, streams, start, chance, out):
    """Fill `out` with the L1 norms of what stays, summed as `kernels.fold.total` does."""
    t, n = experts.shape
    b = np.empty(CHUNK, np.float32)
    drawn = np.empty(CHUNK, np.uint32)
    tau = np.empty((t, CHUNK), np.float32)
    lanes = np.zeros((t, LANES), np.float64)
    for low in range(0, n, CHUNK):
        high = min(low + CHUNK, n)
        m = high - low
        load(base[low:high], b[:m])
        for j in range(t):
            load_update(b[:m], experts[j, low:high], tau[j, :m])
            _drop(tau[j, :m], streams[j], start + np.uint64(low), chance[j], drawn[:m])
            add_sizes(tau[j, :m], lanes[j])
    close_sizes(lanes, tau, n, out)


@jit
def _block(
    base, experts, streams, start, chance, factor, divide, weight, vote, normalize, whole, scale,
    out,
):  # fmt: skip
    t, n = experts.shape
    one = np.float32(1)
    b = np.empty(CHUNK, np.float32)
    drawn = np.empty(CHUNK, np.uint32)
    tau = np.empty((t, CHUNK), np.float32)
    for low in range(0, n, CHUNK):
        high = min(low + CHUNK, n)
        m = high - low
        load(base[low:high], b[:m])
        for j in range(t):
            row = tau[j, :m]
            load_update(b[:m], experts[j, low:high], row)
            _drop(row, streams[j], start + np.uint64(low), chance[j], drawn[:m])
            f, w = factor[j], weight[j]
            if divide:
                for i in range(m):
                    row[i] = row[i] / f * w
            else:
                for i in range(m):
                    row[i] = row[i] * f * w
        finish(b[:m], tau, 0, weight, vote, normalize, whole, one, scale, out[low:high])


def _streams(at: At, count: int) -> np.ndarray:
    return np.array([key(at.seed, at.name, j) for j in range(count)], np.uint64)


def _chances(density: Any, count: int) -> np.ndarray:
    """Return what a draw of 24 bits must be below, so that its float32 is below the density."""
    shares = [float(np.float32(share)) for share in per_expert(density, count)]
    return np.array([math.ceil(share * 2**24) for share in shares], np.uint32)


def _after(merger: Any, base: np.ndarray, experts: np.ndarray, *, at: At, **_: Any) -> Summed:
    """Return the L1 norms of what stays."""
    t = experts.shape[0]
    sums = np.empty(t)
    chances = _chances(merger.density, t)
    _survivors(base, experts, _streams(at, t), np.uint64(at.start), chances, sums)
    return Summed(sums)


values = {"after": _after}


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    before: np.ndarray | None = None,
    after: np.ndarray | None = None,
    out: np.ndarray | None = None,
    vote: bool = False,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.dare_linear.DareLinear`."""
    t = experts.shape[0]
    factor, divide = np.ones(t, np.float32), False
    if before is not None and after is not None:
        factor = np.array(l1_factors(before, after), np.float32)
    elif merger.rescale:
        factor, divide = np.array(per_expert(merger.density, t), np.float32), True
    whole = total_weight(merger.weight, t) if merger.normalize and not vote else 1.0
    out = space(base, out)
    _block(
        base,
        experts,
        _streams(at, t),
        np.uint64(at.start),
        _chances(merger.density, t),
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

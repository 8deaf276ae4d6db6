"""DELLA on some rows: rank by magnitude, draw with a chance that rises with rank, drop, add."""

from typing import Any

import numba as nb
import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.fold import Summed
from pluribus.core.merger import At
from pluribus.core.random import draw, key
from pluribus.core.sparse import l1_factors, total_weight
from pluribus.kernels.combine import CHUNK, finish
from pluribus.kernels.dare_linear import sizes


@nb.njit(nogil=True, cache=True)
def _ranks(base, expert, keys, spare_keys, order, spare_order, rank):
    """Fill `rank` with each element's position by |expert - base|, equal ones by place.

    Radix sort by bytes; a byte that all elements share costs only its count.
    """
    n = base.size
    counts = np.zeros((4, 256), np.int64)
    for i in range(n):
        size = abs(expert[i] - base[i])
        keys[i] = np.float32(size).view(np.uint32)
        order[i] = i
    for i in range(n):
        bits = keys[i]
        counts[0, bits & np.uint32(255)] += 1
        counts[1, (bits >> np.uint32(8)) & np.uint32(255)] += 1
        counts[2, (bits >> np.uint32(16)) & np.uint32(255)] += 1
        counts[3, bits >> np.uint32(24)] += 1
    for byte in range(4):
        shift = np.uint32(8 * byte)
        if counts[byte, (keys[0] >> shift) & np.uint32(255)] == n:
            continue
        at = 0
        for digit in range(256):
            count = counts[byte, digit]
            counts[byte, digit] = at
            at += count
        for i in range(n):
            digit = (keys[i] >> shift) & np.uint32(255)
            place = counts[byte, digit]
            counts[byte, digit] += 1
            spare_keys[place] = keys[i]
            spare_order[place] = order[i]
        keys, spare_keys = spare_keys, keys
        order, spare_order = spare_order, order
    for i in range(n):
        rank[order[i]] = i


@nb.njit(nogil=True, cache=True)
def _survives(base, expert, stream, start, density, spread, step, keep, chance):
    """Fill, for rows (r, c), what stays and the chance each element had."""
    rows, cols = base.shape
    keys = np.empty(cols, np.uint32)
    spare_keys = np.empty(cols, np.uint32)
    order = np.empty(cols, np.int32)
    spare_order = np.empty(cols, np.int32)
    rank = np.zeros(cols, np.int32)
    less = np.float32(1 if cols > 1 else 0)
    for row in range(rows):
        if spread > 0:
            _ranks(base[row], expert[row], keys, spare_keys, order, spare_order, rank)
        first = start + np.uint64(row * cols)
        for i in range(cols):
            chance[row, i] = density + (np.float32(rank[i]) * step - less) * spread
        for i in range(cols):
            keep[row, i] = draw(stream, first + np.uint64(i)) < chance[row, i]


@nb.njit(nogil=True, cache=True)
def _norm(base, expert, keep):
    total = 0.0
    for i in range(base.size):
        total += np.float64(abs(expert[i] - base[i])) if keep[i] else 0.0
    return total


@nb.njit(nogil=True, cache=True)
def _block(base, experts, keep, chance, divide, factor, weight, vote, normalize, whole, scale, out):
    t, n = experts.shape
    zero, one = np.float32(0), np.float32(1)
    tau = np.empty((t, CHUNK), np.float32)
    for low in range(0, n, CHUNK):
        high = min(low + CHUNK, n)
        m = high - low
        for j in range(t):
            for i in range(m):
                delta = experts[j, low + i] - base[low + i]
                tau[j, i] = delta if keep[j, low + i] else zero
            if divide:
                for i in range(m):
                    tau[j, i] = tau[j, i] / chance[j, low + i] * weight[j]
            else:
                for i in range(m):
                    tau[j, i] = tau[j, i] * factor[j] * weight[j]
        finish(
            base[low:high], tau[:, :m], weight, vote, normalize, whole, one, scale, out[low:high]
        )


def _kept(merger: Any, base: np.ndarray, experts: np.ndarray, at: At) -> tuple[np.ndarray, ...]:
    """Return what stays and with which chance, both (t, r, c)."""
    t = experts.shape[0]
    keep = np.empty(experts.shape, np.bool_)
    chance = np.empty(experts.shape, np.float32)
    density, epsilon = per_expert(merger.density, t), per_expert(merger.epsilon, t)
    step = np.float32(2 / max(base.shape[-1] - 1, 1))
    for j in range(t):
        _survives(
            base,
            experts[j],
            np.uint64(key(at.seed, at.name, j)),
            np.uint64(at.start),
            np.float32(density[j]),
            np.float32(0 if density[j] >= 1 else epsilon[j]),
            step,
            keep[j],
            chance[j],
        )
    return keep, chance


def values(
    merger: Any, name: str, base: np.ndarray, experts: np.ndarray, *, at: At, **_: Any
) -> Summed | None:
    """Return the L1 norms before or after dropping."""
    if name == "before":
        return sizes(base, experts)
    keep, _chance = _kept(merger, base, experts, at)
    flat = base.reshape(-1)
    return Summed(
        np.array(
            [
                _norm(flat, row.reshape(-1), kept.reshape(-1))
                for row, kept in zip(experts, keep, strict=True)
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
    """See `pluribus.merge.della_linear.DellaLinear`."""
    t = experts.shape[0]
    keep, chance = _kept(merger, base, experts, at)
    factor, divide = np.ones(t, np.float32), False
    if before is not None and after is not None:
        factor = np.array(l1_factors(before, after), np.float32)
    elif merger.rescale:
        divide = True
    whole = total_weight(merger.weight, t) if merger.normalize and not vote else 1.0
    out = np.empty(base.size, np.float32)
    _block(
        base.reshape(-1),
        experts.reshape(t, -1),
        keep.reshape(t, -1),
        chance.reshape(t, -1),
        divide,
        factor,
        np.array(per_expert(merger.weight, t), np.float32),
        vote,
        merger.normalize,
        np.float32(whole),
        np.float32(merger.scale),
        out,
    )
    return out.reshape(base.shape)

"""DELLA on some rows: rank by magnitude, draw with a chance that rises with rank, drop, add.

Sorting a row is hardly ever needed to know who stays: a draw settles the matter for all ranks but
the few whose chance it falls between. So magnitudes are counted in even bins, which tells each
element's rank to within its bin, and only where both ends of that range disagree is the exact rank
counted. Rows whose values crowd in a few bins are sorted.
"""

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
from pluribus.kernels.fold import LANES, add_sizes, sum_sizes

BINS = 256
DOUBTFUL = 64  # elements of a row whose exact rank may be counted one by one


@jit
def _ranks(tau, keys, spare_keys, order, spare_order, rank):
    """Fill `rank` with each element's position by magnitude, equal ones by place.

    Radix sort by bytes; a byte that all elements share costs only its count.
    """
    n = tau.size
    counts = np.zeros((4, 256), np.int64)
    bits = tau.view(np.uint32)
    for i in range(n):
        keys[i] = bits[i] & np.uint32(0x7FFFFFFF)
        order[i] = i
    for i in range(n):
        size = keys[i]
        counts[0, size & np.uint32(255)] += 1
        counts[1, (size >> np.uint32(8)) & np.uint32(255)] += 1
        counts[2, (size >> np.uint32(16)) & np.uint32(255)] += 1
        counts[3, size >> np.uint32(24)] += 1
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


@jit
def _chance(rank, density, spread, step, less):
    return density + (np.float32(rank) * step - less) * spread


@jit
def _below(chance):
    """Return what a draw of 24 bits must be below to be below `chance` as a float32."""
    return np.uint32(np.ceil(np.float64(chance) * 16777216.0))


@jit
def _as_float(bits):
    return np.uint32(bits).view(np.float32)


@jit
def _binned(tau, bins, counts):
    """Count magnitudes in even bins up to the largest; return how many ranks may be in doubt."""
    n = tau.size
    bits = tau.view(np.uint32)
    top = np.uint32(0)
    for i in range(n):
        size = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        top = size if size > top else top
    scale = np.float32(BINS - 1) / _as_float(top)
    if not scale < np.float32(3e38):
        return np.inf
    for i in range(n):
        bins[i] = np.uint32(abs(tau[i]) * scale)
    counts[:] = 0
    for i in range(n):
        counts[bins[i]] += 1
    crowd = np.int64(0)
    for k in range(BINS):
        crowd += np.int64(counts[k]) * np.int64(counts[k])
    return crowd / n


@jit
def _rank(tau, i):
    """Count how many elements of a row come before element i, equal ones by place."""
    size = abs(tau[i])
    count = np.uint32(0)
    for k in range(i):
        count += np.uint32(abs(tau[k]) <= size)
    after = tau[i:]
    for k in range(after.size):
        count += np.uint32(abs(after[k]) < size)
    return np.int64(count)


@jit
def _draw(tau, stream, first, density, spread, step, less, exact, work, chances):
    """Clear the updates of one row that do not stay; with `exact` fill in everyone's chance."""
    n = tau.size
    zero = np.float32(0)
    drawn, keys, spare_keys, order, spare_order, rank, bins, counts, low, gap, flags = work
    numbers(stream, first, drawn)
    if spread == zero:
        limit = _below(_chance(0, density, spread, step, less))
        for i in range(n):
            chances[i] = density
            tau[i] = tau[i] if drawn[i] < limit else zero
        return
    if not exact and _binned(tau, bins, counts) * 2.0 * spread < DOUBTFUL:
        start = 0
        for k in range(BINS):
            spare_order[k] = start
            start += counts[k]
        spare_order[BINS] = start
        for k in range(BINS + 1):
            low[k] = _below(_chance(spare_order[k], density, spread, step, less))
        for k in range(BINS):
            gap[k] = np.uint32(low[1:][k] - low[k])
        for i in range(n):
            keys[i] = low[bins[i]]
        for i in range(n):
            spare_keys[i] = gap[bins[i]]
        for i in range(n):  # whose draw lies between the chances of both ends of their bin
            flags[i] = np.uint8(np.uint32(drawn[i] - keys[i]) < spare_keys[i])
        for i in range(n):
            keys[i] = np.uint32(drawn[i] < keys[i])
        eights = flags.view(np.uint64)
        for k in range(eights.size):
            word = eights[k]
            i = 8 * k
            while word:
                if word & np.uint64(255):
                    limit = _below(_chance(_rank(tau, i), density, spread, step, less))
                    keys[i] = np.uint32(drawn[i] < limit)
                word >>= np.uint64(8)
                i += 1
        for i in range(n):
            tau[i] = tau[i] if keys[i] else zero
        return
    _ranks(tau, keys, spare_keys, order, spare_order, rank)
    for i in range(n):
        chances[i] = _chance(rank[i], density, spread, step, less)
    for i in range(n):
        tau[i] = tau[i] if drawn[i] < _below(chances[i]) else zero


@jit
def _work(cols):
    return (
        np.empty(cols, np.uint32),
        np.empty(cols, np.uint32),
        np.empty(cols, np.uint32),
        np.empty(cols, np.int32),
        np.empty(max(cols, BINS + 1), np.int32),
        np.empty(cols, np.int32),
        np.empty(cols, np.uint32),
        np.empty(BINS, np.int32),
        np.empty(BINS + 1, np.uint32),
        np.empty(BINS, np.uint32),
        np.zeros(cols + -cols % 8, np.uint8),
    )


@jit
def _survivors(base, experts, cols, streams, start, density, spread, step, less, out):
    """Fill `out` with the L1 norms of what stays, summed as `kernels.fold.total` does."""
    t, n = experts.shape
    b = np.empty(cols, np.float32)
    row = np.empty(cols, np.float32)
    chances = np.empty(cols, np.float32)
    work = _work(cols)
    lanes = np.zeros((t, LANES), np.float64)
    tails = np.zeros((t, 2 * LANES), np.float32)  # a row need not end where a row of lanes does
    filled = np.zeros(t, np.int64)
    for low in range(0, n, cols):
        load(base[low : low + cols], b)
        for j in range(t):
            load_update(b, experts[j, low : low + cols], row)
            _draw(
                row, streams[j], start + np.uint64(low), density[j], spread[j], step, less, False,
                work, chances,
            )  # fmt: skip
            i = 0
            if filled[j]:
                i = min(LANES - filled[j], cols)
                tails[j, filled[j] : filled[j] + i] = row[:i]
                filled[j] += i
                if filled[j] == LANES:
                    add_sizes(tails[j, :LANES], lanes[j])
                    filled[j] = 0
            rest = (cols - i) % LANES
            add_sizes(row[i:], lanes[j])
            tails[j, filled[j] : filled[j] + rest] = row[cols - rest :]
            filled[j] += rest
    for j in range(t):
        out[j] = sum_sizes(lanes[j], tails[j, : filled[j]])


@jit
def _block(
    base, experts, cols, streams, start, density, spread, step, less, divide, factor, weight, vote,
    normalize, whole, scale, out,
):  # fmt: skip
    t, n = experts.shape
    one = np.float32(1)
    b = np.empty(cols, np.float32)
    tau = np.empty((t, cols), np.float32)
    chances = np.empty(cols, np.float32)
    work = _work(cols)
    for low in range(0, n, cols):
        load(base[low : low + cols], b)
        for j in range(t):
            row = tau[j]
            load_update(b, experts[j, low : low + cols], row)
            _draw(
                row, streams[j], start + np.uint64(low), density[j], spread[j], step, less, divide,
                work, chances,
            )  # fmt: skip
            f, w = factor[j], weight[j]
            if divide:
                for i in range(cols):
                    row[i] = row[i] / chances[i] * w
            else:
                for i in range(cols):
                    row[i] = row[i] * f * w
        for first in range(0, cols, CHUNK):
            last = min(first + CHUNK, cols)
            finish(
                b[first:last], tau, first, weight, vote, normalize, whole, one, scale,
                out[low + first : low + last],
            )  # fmt: skip


def _drawing(merger: Any, experts: np.ndarray, at: At) -> tuple[Any, ...]:
    """Return columns, streams, start, densities, spreads, step and offset of the chances."""
    t, cols = experts.shape[0], experts.shape[-1]
    density, epsilon = per_expert(merger.density, t), per_expert(merger.epsilon, t)
    spread = [0.0 if d >= 1 else e for d, e in zip(density, epsilon, strict=True)]
    return (
        cols,
        np.array([key(at.seed, at.name, j) for j in range(t)], np.uint64),
        np.uint64(at.start),
        np.array(density, np.float32),
        np.array(spread, np.float32),
        np.float32(2 / max(cols - 1, 1)),
        np.float32(1 if cols > 1 else 0),
    )


def _after(merger: Any, base: np.ndarray, experts: np.ndarray, *, at: At, **_: Any) -> Summed:
    """Return the L1 norms of what stays."""
    t = experts.shape[0]
    sums = np.empty(t)
    _survivors(base.reshape(-1), experts.reshape(t, -1), *_drawing(merger, experts, at), sums)
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
    """See `pluribus.merge.della_linear.DellaLinear`."""
    t = experts.shape[0]
    factor, divide = np.ones(t, np.float32), False
    if before is not None and after is not None:
        factor = np.array(l1_factors(before, after), np.float32)
    elif merger.rescale:
        divide = True
    whole = total_weight(merger.weight, t) if merger.normalize and not vote else 1.0
    out = space(base, out)
    _block(
        base.reshape(-1),
        experts.reshape(t, -1),
        *_drawing(merger, experts, at),
        divide,
        factor,
        np.array(per_expert(merger.weight, t), np.float32),
        vote,
        merger.normalize,
        np.float32(whole),
        np.float32(merger.scale),
        out.reshape(-1),
    )
    return out

"""SCE in one pass a step: variance over experts, energy of what it selects, weighted vote."""

from typing import Any

import numpy as np

from pluribus.core.fold import Summed
from pluribus.core.merger import At
from pluribus.core.order import Selection
from pluribus.kernels.chunks import CHUNK, jit, load, load_update, space, store
from pluribus.kernels.combine import elect
from pluribus.kernels.fold import LANES, add_sizes, close_sizes

ALL = np.iinfo(np.int64).max


@jit
def _variance(tau, mean, out):
    """Fill `out` (m,) with the variance over t of a chunk of updates, the first m of (t, CHUNK)."""
    t, m = tau.shape[0], out.size
    part = np.float32(1 / t)
    first = tau[0, :m]
    for i in range(m):
        mean[i] = first[i] - first[i]
    for j in range(1, t):
        row = tau[j, :m]
        for i in range(m):
            mean[i] += np.float32(row[i] - first[i])
    for i in range(m):
        mean[i] = first[i] + mean[i] * part
    for i in range(m):
        rest = np.float32(first[i] - mean[i])
        out[i] = rest * rest
    for j in range(1, t):
        row = tau[j, :m]
        for i in range(m):
            rest = np.float32(row[i] - mean[i])
            out[i] += rest * rest
    for i in range(m):
        out[i] = out[i] * part


@jit
def _variances(base, experts, out):
    t, n = experts.shape
    b = np.empty(CHUNK, np.float32)
    mean = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        for j in range(t):
            load_update(b[:m], experts[j, start:stop], tau[j, :m])
        _variance(tau, mean, out[start:stop])


@jit
def _choose(variance, cut, spare):
    """Turn a chunk of variances into 1 for the selected, ties in order while `spare` lasts."""
    zero, one = np.float32(0), np.float32(1)
    if spare == 0:
        for i in range(variance.size):
            variance[i] = one if variance[i] > cut else zero
        return spare
    tied = np.uint32(0)
    for i in range(variance.size):
        tied += np.uint32(variance[i] == cut)
    if spare == ALL or np.int64(tied) <= spare:
        for i in range(variance.size):
            variance[i] = one if variance[i] >= cut else zero
        return spare if spare == ALL else spare - np.int64(tied)
    for i in range(variance.size):
        keep = variance[i] > cut
        if variance[i] == cut and spare > 0:
            keep = True
            spare -= 1
        variance[i] = one if keep else zero
    return spare


@jit
def _updates(b, experts, start, stop, select, cut, spare, mean, chosen, tau):
    """Fill `tau` (t, CHUNK) with a chunk's chosen updates; return the ties that are left."""
    t, m = tau.shape[0], b.size
    for j in range(t):
        load_update(b, experts[j, start:stop], tau[j, :m])
    if select:
        _variance(tau, mean, chosen)
        spare = _choose(chosen, cut, spare)
        for j in range(t):
            row = tau[j, :m]
            for i in range(m):
                row[i] = row[i] * chosen[i]
    return spare


@jit
def _energy(base, experts, select, cut, spare, out):
    """Fill `out` with the sums of squares of the chosen updates, as `kernels.fold.total` adds."""
    t, n = experts.shape
    b = np.empty(CHUNK, np.float32)
    mean = np.empty(CHUNK, np.float32)
    chosen = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    lanes = np.zeros((t, LANES), np.float64)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        spare = _updates(b[:m], experts, start, stop, select, cut, spare, mean, chosen[:m], tau)
        for j in range(t):
            row = tau[j, :m]
            for i in range(m):
                row[i] = row[i] * row[i]
            add_sizes(row, lanes[j])
    close_sizes(lanes, tau, n, out)


@jit
def _block(base, experts, select, cut, spare, weight, out):
    t, n = experts.shape
    zero, one, least = np.float32(0), np.float32(1), np.float32(1e-6)
    b = np.empty(CHUNK, np.float32)
    mean = np.empty(CHUNK, np.float32)
    chosen = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    total = np.empty(CHUNK, np.float32)
    kept = np.empty(CHUNK, np.float32)
    divisor = np.empty(CHUNK, np.float32)
    sign = np.empty(CHUNK, np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        spare = _updates(b[:m], experts, start, stop, select, cut, spare, mean, chosen[:m], tau)
        first = tau[0, :m]
        for i in range(m):
            total[i] = first[i]
            kept[i] = zero
            divisor[i] = zero
        for j in range(1, t):
            row = tau[j, :m]
            for i in range(m):
                total[i] += row[i]
        elect(total[:m], one, sign)
        for j in range(t):
            w = weight[j]
            row = tau[j, :m]
            for i in range(m):
                x = row[i]
                agrees = x * sign[i] > zero
                kept[i] += x * w if agrees else zero
                divisor[i] += w if agrees else zero
        for i in range(m):
            kept[i] = b[i] + kept[i] / max(divisor[i], least)
        store(kept[:m], out[start:stop])


def _end(at: At, chosen: Selection | None) -> tuple[bool, np.float32, np.int64]:
    if chosen is None:
        return False, np.float32(0), np.int64(0)
    return True, np.float32(chosen.cut()[0]), np.int64(chosen.spare(at)[0])


def _spread(merger: Any, base: np.ndarray, experts: np.ndarray, **_: Any) -> np.ndarray:
    """Return the variance over experts, (1, n)."""
    out = np.empty((1, base.size), np.float32)
    _variances(base, experts, out[0])
    return out


def _energies(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    chosen: Selection | None = None,
    **_: Any,
) -> Summed:
    """Return the energy of what is chosen."""
    sums = np.empty(experts.shape[0])
    _energy(base, experts, *_end(at, chosen), sums)
    return Summed(sums)


values = {"chosen": _spread, "energy": _energies}


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    energy: np.ndarray,
    chosen: Selection | None = None,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.sce.Sce`."""
    mean = energy / at.size
    total = mean.sum()
    weight = np.full(mean.shape, 1 / mean.size) if total < 1e-6 else mean / total
    out = space(base, out)
    _block(base, experts, *_end(at, chosen), weight.astype(np.float32), out)
    return out

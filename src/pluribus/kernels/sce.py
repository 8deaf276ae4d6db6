"""SCE in one pass a step: variance over experts, energy of what it selects, weighted vote."""

from typing import Any

import numba as nb
import numpy as np

from pluribus.core.fold import Selection, Summed
from pluribus.core.merger import At
from pluribus.kernels.combine import CHUNK
from pluribus.kernels.fold import dot

ALL = np.iinfo(np.int64).max


@nb.njit(nogil=True, cache=True)
def _variance(base, experts, out):
    t, n = experts.shape
    count = np.float32(t)
    tau = np.empty((t, CHUNK), np.float32)
    mean = np.empty(CHUNK, np.float32)
    for low in range(0, n, CHUNK):
        m = min(CHUNK, n - low)
        for j in range(t):
            for i in range(m):
                tau[j, i] = experts[j, low + i] - base[low + i]
        for i in range(m):
            mean[i] = tau[0, i] - tau[0, i]
        for j in range(1, t):
            for i in range(m):
                mean[i] += tau[j, i] - tau[0, i]
        for i in range(m):
            mean[i] = tau[0, i] + mean[i] / count
        for i in range(m):
            rest = tau[0, i] - mean[i]
            out[low + i] = rest * rest
        for j in range(1, t):
            for i in range(m):
                rest = tau[j, i] - mean[i]
                out[low + i] += rest * rest
        for i in range(m):
            out[low + i] = out[low + i] / count


@nb.njit(nogil=True, cache=True)
def _choose(variance, cut, spare, chosen):
    """Fill `chosen` with 1 for the selected, ties in order while `spare` lasts."""
    for i in range(variance.size):
        keep = variance[i] > cut
        if variance[i] == cut and spare > 0:
            keep = True
            if spare != ALL:
                spare -= 1
        chosen[i] = np.float32(keep)


@nb.njit(nogil=True, cache=True)
def _updates(base, expert, chosen, out):
    for i in range(base.size):
        out[i] = (expert[i] - base[i]) * chosen[i]


@nb.njit(nogil=True, cache=True)
def _block(base, experts, chosen, weight, out):
    t, n = experts.shape
    zero, least = np.float32(0), np.float32(1e-6)
    tau = np.empty((t, CHUNK), np.float32)
    total = np.empty(CHUNK, np.float32)
    kept = np.empty(CHUNK, np.float32)
    divisor = np.empty(CHUNK, np.float32)
    for low in range(0, n, CHUNK):
        m = min(CHUNK, n - low)
        for j in range(t):
            for i in range(m):
                tau[j, i] = (experts[j, low + i] - base[low + i]) * chosen[low + i]
        for i in range(m):
            total[i] = tau[0, i]
            kept[i] = zero
            divisor[i] = zero
        for j in range(1, t):
            for i in range(m):
                total[i] += tau[j, i]
        for j in range(t):
            w = weight[j]
            for i in range(m):
                row = tau[j, i]
                agrees = ((total[i] >= zero) & (row > zero)) | ((total[i] < zero) & (row < zero))
                kept[i] += row * w if agrees else zero
                divisor[i] += w if agrees else zero
        for i in range(m):
            out[low + i] = base[low + i] + kept[i] / max(divisor[i], least)


def _chosen(base: np.ndarray, experts: np.ndarray, at: At, chosen: Selection | None) -> np.ndarray:
    out = np.ones(base.size, np.float32)
    if chosen is not None:
        spread = np.empty(base.size, np.float32)
        _variance(base, experts, spread)
        _choose(spread, np.float32(chosen.cut()[0]), np.int64(chosen.spare(at)[0]), out)
    return out


def values(
    merger: Any,
    name: str,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    chosen: Selection | None = None,
    **_: Any,
) -> np.ndarray | Summed:
    """Return the variance over experts, (1, n), or the energy of what is chosen."""
    if name == "chosen":
        out = np.empty((1, base.size), np.float32)
        _variance(base, experts, out[0])
        return out
    mask = _chosen(base, experts, at, chosen)
    tau = np.empty(base.size, np.float32)
    sums = []
    for row in experts:
        _updates(base, row, mask, tau)
        sums.append(dot(tau, tau))
    return Summed(np.array(sums))


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    at: At,
    energy: np.ndarray,
    chosen: Selection | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.sce.Sce`."""
    mean = energy / at.size
    total = mean.sum()
    weight = np.full(mean.shape, 1 / mean.size) if total < 1e-6 else mean / total
    out = np.empty_like(base)
    _block(base, experts, _chosen(base, experts, at, chosen), weight.astype(np.float32), out)
    return out

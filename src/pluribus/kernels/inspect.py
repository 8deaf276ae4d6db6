"""What `inspect` counts in a block: signs and masks as bits, pairs of experts by population count.

Chunks stay in the first cache. A chunk's flags are written as bytes, packed into words of 64 bits,
and every pair of experts then costs a few operations for 64 coordinates. Blocks are float32 or
float64, or the bit patterns of bfloat16, which are widened as they are loaded.
"""

from functools import partial
from typing import Any, cast

import numpy as np
from numba import types
from numba.extending import intrinsic

from pluribus.core.merger import At
from pluribus.core.order import Selection
from pluribus.kernels.chunks import jit, load, wide

sums = partial(jit, fastmath={"reassoc", "contract"})
CHUNK = 2048
WORDS = CHUNK // 64
_EIGHT = np.uint64(0x0102040810204080)  # gathers the lowest bits of eight bytes in the top byte


def _ones(typingctx, word):
    """Count the bits set in a word."""

    def emit(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), emit


ones = cast(Any, intrinsic(_ones))


@jit
def _pack(flags, words):
    """Pack 0/1 bytes into words, one bit each; the order of bits is the same for all."""
    eights = flags.view(np.uint64)
    octets = words.view(np.uint8)
    for i in range(octets.size):
        octets[i] = (eights[i] * _EIGHT) >> np.uint64(56)


@jit
def _signs(plus, minus, nonzero, both, opposed, some):
    """Add up one chunk of packed signs.

    `nonzero` (t,); `both`, `opposed` (t, t), below the diagonal: pairs that are both non-zero, and
    of unlike sign; `some` (3,): coordinates where one or more, two or more, and both signs occur.
    """
    t = plus.shape[0]
    for i in range(t):
        for w in range(WORDS):
            nonzero[i] += ones(plus[i, w] | minus[i, w])
        for j in range(i):
            for w in range(WORDS):
                p, m, q, n = plus[i, w], minus[i, w], plus[j, w], minus[j, w]
                both[i, j] += ones((p | m) & (q | n))
                opposed[i, j] += ones((p & n) | (m & q))
    for w in range(WORDS):
        one, two = np.uint64(0), np.uint64(0)
        up, down = np.uint64(0), np.uint64(0)
        for i in range(t):
            here = plus[i, w] | minus[i, w]
            two |= one & here
            one |= here
            up |= plus[i, w]
            down |= minus[i, w]
        some[0] += ones(one)
        some[1] += ones(two)
        some[2] += ones(up & down)


@jit
def _masks(masks, sizes, classes):
    """Add up one chunk of packed masks: how many each holds, and at how many coordinates one or
    more, two or more, and all of them do."""
    t = masks.shape[0]
    for w in range(WORDS):
        one, two, all_of = np.uint64(0), np.uint64(0), ~np.uint64(0)
        for i in range(t):
            here = masks[i, w]
            sizes[i] += ones(here)
            two |= one & here
            one |= here
            all_of &= here
        classes[0] += ones(one)
        classes[1] += ones(two)
        classes[2] += ones(all_of)


# Sums may be reordered to fill vector registers: a report needs no bits that all processors share.


@sums
def _dot(x, y):
    """Return the float64 product of two chunks."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@sums
def _size(x):
    """Return the float64 sum of a chunk's magnitudes."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(abs(x[i]))
    return total


@jit
def _flag_signs(x, flags, plus, minus):
    """Pack which elements of a chunk are positive, and which negative."""
    for i in range(CHUNK):
        flags[i] = x[i] > 0
    _pack(flags, plus)
    for i in range(CHUNK):
        flags[i] = x[i] < 0
    _pack(flags, minus)


@jit
def _flag_mask(x, total, mask_lambda, flags, mask):
    """Pack which elements lie in an expert's TALL mask."""
    for i in range(CHUNK):
        flags[i] = abs(x[i]) > mask_lambda * abs(total[i] - x[i])
    _pack(flags, mask)


@jit
def _add(x, total):
    """Add a chunk to another."""
    for i in range(CHUNK):
        total[i] += x[i]


@jit
def _minus(x, base, tau):
    """Fill a chunk with the difference of two runs of at most its length, and zeros beyond."""
    for i in range(base.size):
        tau[i] = wide(x[i]) - base[i]
    tau[x.size :] = 0


@jit
def _differences(base, experts, start, row, tau):
    """Fill `tau` (t, CHUNK) with one chunk of task vectors, `row` with the base's; return that."""
    t, n = experts.shape
    stop = min(start + CHUNK, n)
    own = row[: stop - start]
    load(base[start:stop], own)
    for j in range(t):
        _minus(experts[j, start:stop], own, tau[j])
    return own


@jit
def _trim(x, cut, spare):
    """Zero what is below the cut, and all but the first `spare` that equal it; return the rest."""
    zero = x.dtype.type(0)
    tied = 0
    for i in range(CHUNK):
        tied += np.int64(abs(x[i]) == cut)
    if tied <= spare:
        for i in range(CHUNK):
            x[i] = x[i] if abs(x[i]) >= cut else zero
        return spare - tied
    if spare == 0:
        for i in range(CHUNK):
            x[i] = x[i] if abs(x[i]) > cut else zero
        return spare
    for i in range(CHUNK):
        size = abs(x[i])
        keep = size > cut
        if size == cut and spare > 0:
            keep = True
            spare -= 1
        x[i] = x[i] if keep else zero
    return spare


@jit
def _survey(base, experts, mask_lambda, sums, counts, both, opposed):
    """Measure all of a block that needs no fold before it.

    `sums` (1 + t + t t): squared norm of the base, L1 norms, inner products of the task vectors;
    `counts` (t + 3 + t + 3): non-zero elements, `some` of `_signs`, sizes and classes of `_masks`.
    """
    t, n = experts.shape
    row = np.empty(CHUNK, mask_lambda.dtype)
    tau = np.empty((t, CHUNK), mask_lambda.dtype)
    total = np.empty(CHUNK, mask_lambda.dtype)
    flags = np.empty(CHUNK, np.uint8)
    plus = np.empty((t, WORDS), np.uint64)
    minus = np.empty((t, WORDS), np.uint64)
    masks = np.empty((t, WORDS), np.uint64)
    for start in range(0, n, CHUNK):
        own = _differences(base, experts, start, row, tau)
        sums[0] += _dot(own, own)
        total[:] = 0
        for j in range(t):
            sums[1 + j] += _size(tau[j])
            for i in range(j + 1):
                sums[1 + t + j * t + i] += _dot(tau[j], tau[i])
            _add(tau[j], total)
            _flag_signs(tau[j], flags, plus[j], minus[j])
        for j in range(t):
            _flag_mask(tau[j], total, mask_lambda[0], flags, masks[j])
        _signs(plus, minus, counts[:t], both, opposed, counts[t : t + 3])
        _masks(masks, counts[t + 3 : 2 * t + 3], counts[2 * t + 3 :])
    for j in range(t):
        for i in range(j):
            sums[1 + t + i * t + j] = sums[1 + t + j * t + i]


@jit
def _supports(base, experts, cut, spare, sums, counts, both, opposed):
    """Measure the largest elements: those above `cut` (t,), and `spare` (t,) of those equal to it.

    `sums` (t,): their squared norms; `counts` (t + 3): sizes and `some` of `_signs`. Zeros are in
    no support. Uses up `spare`.
    """
    t, n = experts.shape
    row = np.empty(CHUNK, cut.dtype)
    tau = np.empty((t, CHUNK), cut.dtype)
    flags = np.empty(CHUNK, np.uint8)
    plus = np.empty((t, WORDS), np.uint64)
    minus = np.empty((t, WORDS), np.uint64)
    for start in range(0, n, CHUNK):
        _differences(base, experts, start, row, tau)
        for j in range(t):
            spare[j] = _trim(tau[j], cut[j], spare[j])
            sums[j] += _dot(tau[j], tau[j])
            _flag_signs(tau[j], flags, plus[j], minus[j])
        _signs(plus, minus, counts[:t], both, opposed, counts[t:])


def survey(method: Any, base: np.ndarray, experts: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
    """Return sums, counts, both and opposed of a block: see `_survey`."""
    t = experts.shape[0]
    made = np.zeros(1 + t + t * t), np.zeros(2 * t + 6, np.int64), *_pairs(t)
    _survey(base, experts, np.array([method.mask_lambda], _working(base)), *made)
    return made


def supports(
    method: Any, base: np.ndarray, experts: np.ndarray, *, at: At, trim: Selection, **_: Any
) -> tuple[np.ndarray, ...]:
    """Return sums, counts, both and opposed of a block's largest elements: see `_supports`."""
    del method
    t = experts.shape[0]
    made = np.zeros(t), np.zeros(t + 3, np.int64), *_pairs(t)
    cut, spare = trim.cut().astype(_working(base)), trim.spare(at).astype(np.int64)
    _supports(base, experts, cut, spare, *made)
    return made


def _pairs(t: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((t, t), np.int64), np.zeros((t, t), np.int64)


def _working(base: np.ndarray) -> Any:
    return np.float32 if base.dtype == np.uint16 else base.dtype


values = {"whole": survey, "support": supports}

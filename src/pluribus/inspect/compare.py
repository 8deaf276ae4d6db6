"""Compare one tensor of two checkpoints, and tell whether the change has a low rank.

Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4: the range of
D = after - before, (r, c), is sketched by Q = orth(D orth(D^T orth(D W))), W normal (c, k + 8); the
squared singular values of Q^T D are a lower bound of those of D, usually tight.
"""

from collections.abc import Sequence

import numpy as np

from pluribus.core.dtypes import narrow
from pluribus.core.source import Source
from pluribus.inspect.change import Change
from pluribus.inspect.kinds import kind_of

SKETCH = 64  # directions that are looked for
HELD = 0.9  # share of the squared norm that a low-rank change has in them
BLOCK = 1 << 21  # elements
SIDES = 16  # shorter sides below this have no low rank to speak of


def compare(name: str, one: Source, other: Source, layer: int | None, largest: int) -> Change:
    """Return how a tensor of two models differs; its rank is looked for up to `largest` elements.

    Elements that are not finite are counted, and left out of norms.
    """
    a, b = one.spec, other.spec
    common = _common(a.shape, b.shape)
    floats = a.kind.is_float and b.kind.is_float
    square, moved, most, changed = 0.0, 0.0, 0.0, 0
    bad = [0, 0]
    rounded = floats and a.dtype != b.dtype and a.shape == b.shape
    wide = np.float64 if "F64" in (a.dtype, b.dtype) or not floats else np.float32
    for start in range(0, common, BLOCK):
        stop = min(start + BLOCK, common)
        x, y = one.floats(start, stop, wide), other.floats(start, stop, wide)
        if rounded:
            again = narrow(x, b.kind)
            rounded = bool(np.array_equal(again, other.load(start, stop)))
        step = np.subtract(y, x, dtype=np.float64 if wide is np.float64 else np.float32)
        fine = np.isfinite(step)
        if not fine.all():
            bad[0] += int((~np.isfinite(x)).sum())
            bad[1] += int((~np.isfinite(y)).sum())
            changed += int(((x != y) & ~fine & ~(np.isnan(x) & np.isnan(y))).sum())
            x, step = x[fine], step[fine]
        changed += int(np.count_nonzero(step))
        square += _square(x)
        moved += _square(step)
        most = max(most, float(np.abs(step).max(initial=0)))
    rank, judged = None, False
    matrix = len(a.shape) >= 2 and a.shape == b.shape and floats
    if matrix and changed and not rounded and not any(bad) and a.size <= largest:
        rank, judged = low_rank(one, other)
    return Change(
        name=name,
        layer=layer,
        kind=kind_of(name, a.shape),
        shape=a.shape,
        new_shape=b.shape,
        dtype=a.dtype,
        new_dtype=b.dtype,
        compared=common,
        norm=square**0.5,
        moved=moved**0.5,
        largest=most,
        changed=changed,
        rounded=rounded,
        non_finite=(bad[0], bad[1]),
        rank=rank,
        judged=judged,
    )


def _square(values: np.ndarray) -> float:
    from pluribus.kernels.fold import dot

    return float(dot(values, values)) if values.size else 0.0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the leading elements that two shapes have in common: all, or those of common rows."""
    if tuple(one) == tuple(other):
        return int(np.prod(one, dtype=np.int64))
    if not one or not other or tuple(one[1:]) != tuple(other[1:]):
        return 0
    return min(one[0], other[0]) * int(np.prod(one[1:], dtype=np.int64))


def low_rank(one: Source, other: Source) -> tuple[int | None, bool]:
    """Return how many directions hold `HELD` of the change's squared norm, None if more than
    `SKETCH` or an eighth of the shorter side; and whether the matrix is large enough to judge."""
    rows = one.spec.shape[0]
    wide = np.float64 if "F64" in (one.spec.dtype, other.spec.dtype) else np.float32
    step = other.floats(wide=wide)
    step -= one.floats(wide=wide)
    matrix = step.reshape(rows, -1)
    side = min(matrix.shape)
    if side < SIDES:
        return None, False
    most = min(SKETCH, side // 8)
    count = min(most + 8, side)
    draw = np.random.default_rng(0).standard_normal((matrix.shape[1], count)).astype(wide)
    found = np.linalg.qr(matrix @ draw)[0]
    found = np.linalg.qr(matrix.T @ found)[0]  # one power step, for spectra that fall slowly
    found = np.linalg.qr(matrix @ found)[0]
    small = np.asarray(found.T @ matrix, np.float64)
    squares = np.linalg.eigvalsh(small @ small.T)[::-1]
    total = _square(matrix.reshape(-1))
    held = np.cumsum(squares[:most]) / total
    enough = np.flatnonzero(held >= HELD)
    return (int(enough[0]) + 1 if enough.size else None), True

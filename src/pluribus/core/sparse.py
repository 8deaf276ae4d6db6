"""Task vectors with gaps: which entries stay, which sign wins, how what is left is added up.

Everything here works on single elements or whole rows, so a tensor may be cut into blocks anywhere.
`tau` are task vectors, (t, n) or (t, r, c).
"""

from collections.abc import Sequence

import numpy as np

from pluribus.core.arrays import Array, column, namespace, per_expert
from pluribus.core.errors import InputError
from pluribus.core.merger import At, PerExpert
from pluribus.core.order import Ranks
from pluribus.core.random import uniform

FAINT = 1e-7  # an L1 norm below this is not restored: what it would be divided by is noise


# -- adding up -------------------------------------------------------------------------------------


def add_up(rows: Array) -> Array:
    """Sum of (t, ...) over its first axis, in order: no pairing that depends on blocks' lengths."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def weighted_sum(rows: Array, weights: Sequence[float] | np.ndarray) -> Array:
    """Sum of (t, ...) rows, each times its weight."""
    return add_up(rows * column(tuple(float(w) for w in weights), rows))


# -- what stays ------------------------------------------------------------------------------------


def band(density: PerExpert, gamma: PerExpert, *, outlier_first: bool = True) -> Ranks:
    """Return two columns of ranks: a band reaches down to the first and begins below the second.

    The top int(gamma n) are left out. Below them int(density n) stay (`outlier_first`), or what is
    left of the top int(density n). A density of 1 keeps everything.
    """

    def ranks(size: int, rows: int) -> np.ndarray:
        pairs = []
        for share, outliers in zip(per_expert(density, rows), per_expert(gamma, rows), strict=True):
            keep, top = int(share * size), int(outliers * size)
            if share >= 1:
                pairs.append((size, 0))
            else:
                pairs.append((min(keep + top, size) if outlier_first else keep, top))
        return np.array(pairs, np.int64).reshape(-1, 2)

    return ranks


def rank(values: Array) -> Array:
    """Position of each element in its row, from 0, the smallest; equal ones in order of place."""
    xp = namespace(values)
    order = xp.argsort(values, axis=-1, stable=True)
    return xp.argsort(order, axis=-1, stable=True)


def top_of_rows(values: Array, counts: Sequence[int] | np.ndarray) -> Array:
    """Return which of (t, r, c) are among the `counts[t]` largest of a row, first come."""
    xp = namespace(values)
    order = xp.argsort(values, axis=-1, descending=True, stable=True)
    place = xp.argsort(order, axis=-1, stable=True)
    return xp.stack([place[i] < int(count) for i, count in enumerate(counts)])


def drawn(share: PerExpert | Array, tau: Array, at: At) -> Array:
    """Return which of `tau` stay if each does with probability `share`, one for all, each or every.

    Expert i uses stream i of the tensor, whatever blocks it is read in.
    """
    shares = share if hasattr(share, "shape") else per_expert(share, tau.shape[0])  # type: ignore[arg-type]
    rows = [
        uniform(at, i, tau).reshape(tau.shape[1:]) < shares[i]  # type: ignore[index]
        for i in range(tau.shape[0])
    ]
    return namespace(tau).stack(rows)


def chances_by_rank(sizes: Array, density: PerExpert, epsilon: PerExpert) -> Array:
    """Chance of each of `sizes` (t, r, c) to stay, rising with its rank in its row.

    From density - epsilon for the smallest to density + epsilon for the largest. A row of one has
    `density`, and so do all elements of an expert whose density is 1.
    """
    xp = namespace(sizes)
    cols = sizes.shape[-1]
    tilt = xp.astype(rank(sizes), sizes.dtype) * (2 / max(cols - 1, 1)) - (1 if cols > 1 else 0)
    t = sizes.shape[0]
    spread = tuple(
        0.0 if d >= 1 else e
        for d, e in zip(per_expert(density, t), per_expert(epsilon, t), strict=True)
    )
    return column(density, sizes) + tilt * column(spread, sizes)


def l1_factors(before: np.ndarray, after: np.ndarray) -> tuple[float, ...]:
    """What kept entries are multiplied by to have the L1 norms that all had; 1 for faint ones."""
    faint = (before < FAINT) | (after < FAINT)
    return tuple(np.where(faint, 1.0, before / np.where(faint, 1.0, after)).tolist())


# -- which sign wins -------------------------------------------------------------------------------


def elected(tau: Array, tie: float = 1.0) -> Array:
    """Sign of the sum over experts, (n,); `tie` where it is zero."""
    xp = namespace(tau)
    total = add_up(tau)
    return xp.where(total == 0, tie, xp.sign(total))


def agreeing(tau: Array, sign: Array) -> Array:
    """Return which entries have the elected sign. Zeros never do; a sign of 0 counts as minus."""
    return namespace(tau).where(sign > 0, tau > 0, tau < 0)


def disjoint(tau: Array, agrees: Array, weights: Array) -> tuple[Array, Array]:
    """Sum of the agreeing entries, and the sum of their weights, (n,) each."""
    kept, divisor = tau[0] * 0, tau[0] * 0
    for row, agree, weight in zip(tau, agrees, weights, strict=True):
        kept = kept + row * agree
        divisor = divisor + agree * weight
    return kept, divisor


# -- the common end --------------------------------------------------------------------------------


def combine(
    base: Array,
    tau: Array,
    weight: PerExpert,
    *,
    scale: float,
    normalize: bool,
    vote: bool = False,
) -> Array:
    """Add weighted task vectors to the base; with `vote` only those of the elected sign.

    `normalize` divides by the weights of all experts, or of those that agree in a coordinate.
    Raises InputError if normalised weights sum to zero.
    """
    weights = column(weight, tau)
    tau = tau * weights
    if vote:
        merged, divisor = disjoint(tau, agreeing(tau, elected(tau)), weights)
        if normalize:
            merged = merged / namespace(tau).where(divisor == 0, 1.0, divisor)
    else:
        merged = add_up(tau)
        if normalize:
            merged = merged / total_weight(weight, tau.shape[0])
    return base + scale * merged


def total_weight(weight: PerExpert, count: int) -> float:
    """Sum of the weights. Raises InputError if it is zero, so that nothing can be divided by it."""
    total = sum(per_expert(weight, count))
    if abs(total) < 1e-8:
        raise InputError(
            f"weights {weight} of {count} experts sum to zero and can't be normalised; "
            "set normalize: false or change a weight"
        )
    return total


def refuse_negative(name: str, weight: PerExpert) -> None:
    """Raise InputError for a negative weight where agreeing weights are divided by."""
    weights = weight if isinstance(weight, tuple) else (weight,)
    if min(weights) < 0:
        raise InputError(
            f"{name}: weight = {weight}: negative weights need normalize: false, or the "
            "divisor can pass through zero"
        )

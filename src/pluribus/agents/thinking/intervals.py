"""Tests and intervals for paired outcomes, in closed form or by chance from a seed.

McNemar 1947, exact; Wilson 1927; Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10:

    delta = p2 - p1,  p1 = (a + losses) / n,  p2 = (a + gains) / n,  Wilson's (l1, u1), (l2, u2)
    lower = delta - sqrt((p2 - l2)^2 - 2 phi (p2 - l2)(u1 - p1) + (u1 - p1)^2)
    upper = delta + sqrt((u2 - p2)^2 - 2 phi (u2 - p2)(p1 - l1) + (p1 - l1)^2)
    phi   = (max(ad - bc - n/2, 0) or ad - bc if negative) / sqrt of the product of the margins
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from pluribus.core.errors import InputError

DRAWS = 2000


def mcnemar(gains: int, losses: int) -> float:
    """Return the exact two-sided p that gains and losses are equally likely; 1 without either."""
    n, least = gains + losses, min(gains, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share. Raises InputError for n < 1."""
    if n < 1:
        raise InputError("a share of no problems has no interval; give at least one")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe(
    both: int, gains: int, losses: int, neither: int, level: float = 0.95
) -> tuple[float, float]:
    """Return Newcombe's paired interval of (gains - losses) / n. Raises InputError without any."""
    n = both + gains + losses + neither
    first, second = both + losses, both + gains
    (l1, u1), (l2, u2) = wilson(first, n, level), wilson(second, n, level)
    p1, p2 = first / n, second / n
    excess = both * neither - gains * losses
    if excess > 0:
        excess = max(excess - n / 2, 0)
    margins = first * (n - first) * second * (n - second)
    phi = excess / math.sqrt(margins) if margins else 0.0
    below, above = p2 - l2, u2 - p2
    down, up = p1 - l1, u1 - p1
    delta = p2 - p1
    low = delta - math.sqrt(max(0.0, below * below - 2 * phi * below * up + up * up))
    high = delta + math.sqrt(max(0.0, above * above - 2 * phi * above * down + down * down))
    return max(-1.0, low), min(1.0, high)


def bootstrap(
    differences: Sequence[float], *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return percentiles of the mean over resampled problems. Raises InputError without any."""
    import numpy as np

    if not differences:
        raise InputError("there are no differences to draw from; give at least one")
    told = np.asarray(differences, np.float64)
    chance = np.random.default_rng(seed)
    means = told[chance.integers(0, len(told), (draws, len(told)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def flipped(differences: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p that the mean of paired differences is 0, by flips of their signs.

    All 2^n flips are tried if they are no more than `draws`; else so many by chance, themselves
    counted with the one that was seen. Raises InputError without any.
    """
    import numpy as np

    if not differences:
        raise InputError("there are no differences to flip; give at least one")
    told = np.asarray(differences, np.float64)
    n = len(told)
    if exact := 2**n <= draws:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (draws, n))
    seen = abs(told.sum())
    extreme = int((np.abs(signs @ told) >= seen - 1e-12 * max(1.0, seen)).sum())
    return extreme / len(signs) if exact else (extreme + 1) / (draws + 1)

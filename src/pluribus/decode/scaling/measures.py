"""How well scaling works: pass@k, controllability, scalability.

    pass@k            1 - C(n - c, k) / C(n, k), c of n right; 1 if n - c < k     (Chen et al. 2021)
    controllability   share of runs with a_min <= tokens <= a_max                 (s1, section 4)
    scalability       mean over budgets a < b of (f(b) - f(a)) / (b - a)          (s1, section 4)

s1: Muennighoff et al. 2025, https://arxiv.org/abs/2501.19393. pass@k:
https://arxiv.org/abs/2107.03374, without bias.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from pluribus.core.errors import InputError


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the chance that k of n samples, `right` of them right, hold a right one.

    Raises InputError unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise InputError(
            f"pass@{k} of {n} samples with {right} right: give 1 <= k <= n and 0 <= right <= n"
        )
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)  # comb is 0 where n - right < k


def controllability(tokens: Sequence[int], least: float = 0, most: float = math.inf) -> float:
    """Return the share of runs whose tokens lie within the limits.

    Raises InputError without a run.
    """
    if not tokens:
        raise InputError("controllability needs at least one run")
    return sum(least <= count <= most for count in tokens) / len(tokens)


def scalability(accuracy: Mapping[float, float]) -> float:
    """Return the mean slope of accuracy by budget over all pairs of budgets.

    Raises InputError with fewer than two budgets.
    """
    if len(accuracy) < 2:
        raise InputError("scalability compares budgets; give the accuracy at two or more")
    pairs = list(combinations(sorted(accuracy), 2))
    return sum((accuracy[b] - accuracy[a]) / (b - a) for a, b in pairs) / len(pairs)

"""Options with many small advantages: which is the best in all? A control for thinking in words.

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333 (working memory): four options, each
with features that are worth points; they are told in one mixed list. The best has the largest sum.
"""

import random
from dataclasses import dataclass

from pluribus.core.merger import PositiveInt
from pluribus.tasks.suites import Item, item_suite

NAMES = ("A", "B", "C", "D")
FEATURES = (
    "quiet street",
    "view of the park",
    "new kitchen",
    "old heating",
    "noise from the lift",
    "short way to work",
    "damp cellar",
    "friendly neighbours",
    "balcony",
    "dark hall",
    "large windows",
    "no storage",
)
SIZES = {"easy": 4, "medium": 8, "hard": 12}  # features of one option


@item_suite(
    "aggregate", kind="control", traits=("symbolic_steps", "needs_state", "long_aggregation")
)
@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Which flat has the largest sum of points?"""

    points: PositiveInt = 3  # a feature is worth -points to points, never 0

    def make(self, n: int, seed: int, difficulty: str) -> list[Item]:
        """See `Suite`. The answers are spread evenly."""
        return [self._item(seed, number, SIZES[difficulty]) for number in range(n)]

    def _item(self, seed: int, number: int, size: int) -> Item:
        chance = random.Random(f"aggregate/{seed}/{number}")
        worth = [one for one in range(-self.points, self.points + 1) if one]
        while True:
            drawn = [[chance.choice(worth) for _ in range(size)] for _ in NAMES]
            sums = [sum(one) for one in drawn]
            if sums.count(max(sums)) == 1:
                break
        best, wanted = sums.index(max(sums)), number % len(NAMES)
        drawn[best], drawn[wanted] = drawn[wanted], drawn[best]
        features = [chance.sample(FEATURES, size) for _ in NAMES]
        told = [
            (name, feature, points)
            for name, own, values in zip(NAMES, features, drawn, strict=True)
            for feature, points in zip(own, values, strict=True)
        ]
        chance.shuffle(told)
        lines = "\n".join(f"Flat {name}, {feature}: {points:+d}" for name, feature, points in told)
        return Item(
            prompt=f"Four flats have good and bad sides, each worth points:\n{lines}\n\n"
            "Which flat has the most points in all? Answer A, B, C or D.",
            answer=NAMES[wanted],
            choices=NAMES,
            meta={"sums": tuple(sum(one) for one in drawn)},
            id=f"aggregate/{seed}/{number}",
        )

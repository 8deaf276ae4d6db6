"""A tilted glass, and which upright one holds as much: a control for thinking in words.

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333 (spatial intuition); theirs is drawn,
ours is told. While the water covers the whole bottom and reaches no rim, its volume in a tilted
cylinder is that of an upright one filled to the middle of the two side heights:

    V = pi r^2 (low + high) / 2,    high - low = 2 r tan(tilt)

Lengths are in centimetres.
"""

import math
import random
from dataclasses import dataclass

from pluribus.tasks.suites import Item, item_suite

NAMES = ("A", "B", "C", "D")
OFF = {
    "easy": 0.6,
    "medium": 0.3,
    "hard": 0.15,
}  # a wrong glass holds at least so much less or more


@item_suite("spatial", kind="control", traits=("hard_to_verbalise", "symbolic_steps"))
@dataclass(frozen=True, kw_only=True)
class Spatial:
    """Which of four upright glasses holds as much as a tilted one?"""

    def make(self, n: int, seed: int, difficulty: str) -> list[Item]:
        """See `Suite`. The answers are spread evenly."""
        return [self._item(seed, number, OFF[difficulty]) for number in range(n)]

    def _item(self, seed: int, number: int, off: float) -> Item:
        chance = random.Random(f"spatial/{seed}/{number}")
        radius, middle = chance.randint(3, 6), chance.randint(8, 14)
        rise = chance.randint(1, 5)  # of the water on either side of the middle
        volume = math.pi * radius**2 * middle
        wanted = number % len(NAMES)
        glasses: list[tuple[int, float]] = []
        widths = chance.sample([one for one in range(2, 9) if one != radius], len(NAMES))
        factors = chance.sample(
            [1 - off, 1 + off, 1 - 1.5 * off, 1 + 1.5 * off, 1 + 2 * off], len(NAMES) - 1
        )
        for place, width in enumerate(widths):
            share = 1.0 if place == wanted else factors.pop()
            glasses.append((width, share * volume / (math.pi * width**2)))
        told = "\n".join(
            f"{name}: inner radius {width} cm, water up to {height:.2f} cm"
            for name, (width, height) in zip(NAMES, glasses, strict=True)
        )
        tilt = math.degrees(math.atan2(rise, radius))
        return Item(
            prompt=f"A round glass with straight sides and an inner radius of {radius} cm is "
            f"tilted by {tilt:.0f} degrees. The water meets its wall {middle - rise} cm above the "
            f"bottom on the high side and {middle + rise} cm on the low side; the whole bottom is "
            "covered and nothing is spilt. Which of these upright glasses holds as much water?\n"
            f"{told}\nAnswer A, B, C or D.",
            answer=NAMES[wanted],
            choices=NAMES,
            meta={
                "radius": radius,
                "sides": (middle - rise, middle + rise),
                "glasses": tuple(glasses),
            },
            id=f"spatial/{seed}/{number}",
        )

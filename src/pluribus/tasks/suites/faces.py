"""Recognition among look-alikes: which of five images shows the very one that was seen?

After Liu et al., ICML 2025, https://arxiv.org/abs/2410.21333: describing a face makes it harder to
recognise. In place of faces, handwritten digits of one class (the digits of scikit-learn that are
embedded in the package): all five candidates have the same description, and one is the target
itself, turned and moved a little. Images are in `media`, the target first, (32, 32), uint8. A model
of text alone cannot be asked.
"""

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pluribus.core.merger import PositiveInt
from pluribus.tasks.suites import Item, item_suite

if TYPE_CHECKING:
    import numpy as np

NAMES = ("A", "B", "C", "D", "E")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TURNED = {"easy": 4.0, "medium": 9.0, "hard": 15.0}  # degrees, at most, either way


@item_suite("faces", kind="hurts people", traits=("hard_to_verbalise",))
@dataclass(frozen=True, kw_only=True)
class Faces:
    """Which of five glyphs of one class is the one shown before?"""

    size: PositiveInt = 32  # pixels of a side

    def make(self, n: int, seed: int, difficulty: str) -> list[Item]:
        """See `Suite`. The answers are spread evenly."""
        import numpy as np

        from pluribus.tasks.sets import images

        digits = images("digits")
        pixels = np.concatenate([digits.x_train, digits.x_test])
        labels = np.concatenate([digits.y_train, digits.y_test])
        items = []
        for number in range(n):
            chance = random.Random(f"faces/{seed}/{number}")
            own = chance.randrange(10)
            chosen = chance.sample([int(i) for i in np.flatnonzero(labels == own)], len(NAMES))
            wanted = number % len(NAMES)
            shown = []
            for i in chosen:
                turn = chance.uniform(0.5, 1) * chance.choice((-1, 1)) * TURNED[difficulty]
                move = (chance.uniform(-0.5, 0.5), chance.uniform(-0.5, 0.5))
                shown.append(rendered(pixels[i], self.size, turn, move))
            target = rendered(pixels[chosen[wanted]], self.size, 0.0, (0.0, 0.0))
            items.append(
                Item(
                    prompt=f"The first image shows a handwritten {WORDS[own]}. Which of the five "
                    "images after it shows the same one, turned and moved a little? All five are "
                    f"a handwritten {WORDS[own]}. Answer A, B, C, D or E.",
                    answer=NAMES[wanted],
                    choices=NAMES,
                    media=(target, *shown),
                    meta={"class": own, "images": tuple(chosen)},
                    id=f"faces/{seed}/{number}",
                )
            )
        return items


def rendered(
    image: "np.ndarray", size: int, degrees: float, move: tuple[float, float]
) -> "np.ndarray":
    """Return an 8 x 8 image of 0..16 as size x size of 0..255, turned, and moved by old pixels.

    Bilinear; what lies outside is black.
    """
    import numpy as np

    side = image.shape[0]
    grid = (np.arange(size) + 0.5) * side / size - side / 2
    y, x = np.meshgrid(grid - move[0], grid - move[1], indexing="ij")
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows, columns = (one + side / 2 - 0.5 for one in (c * y + s * x, c * x - s * y))
    padded = np.pad(image.astype(np.float64), 2)
    rows, columns = np.clip(rows + 2, 0, side + 2), np.clip(columns + 2, 0, side + 2)
    r, k = rows.astype(int), columns.astype(int)
    dr, dk = rows - r, columns - k
    near = (1 - dk) * padded[r, k] + dk * padded[r, k + 1]
    far = (1 - dk) * padded[r + 1, k] + dk * padded[r + 1, k + 1]
    return np.rint(((1 - dr) * near + dr * far) * 255 / 16).clip(0, 255).astype(np.uint8)

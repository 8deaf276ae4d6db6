"""Rotary positions as a model turns them: pairs of a head's values, by multiples of frequencies."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pluribus.core.shapes import Float, Shaped

Pairs = Literal["halves", "neighbours"]


@dataclass(frozen=True)
class Rotation:
    """Turns by whole positions: R_a R_b = R_{a+b}.

    `pairs`: value i goes with i + r (halves, as Llama's) or 2i with 2i + 1 (neighbours, as GPT-J's)
    of the first 2 r values of a head; the rest are left alone. A turn has no scale, whatever the
    model multiplies its cosines with (YaRN).
    """

    frequencies: Float[Tensor, " r"]
    pairs: Pairs = "halves"

    def angles(self, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (..., r) of turns by whole numbers of positions."""
        angle = shifts.double()[..., None] * self.frequencies.double().to(shifts.device)
        return angle.cos().float(), angle.sin().float()

    def turn(
        self, x: Float[Tensor, "... e"], cos: Float[Tensor, "... r"], sin: Float[Tensor, "... r"]
    ) -> Shaped[Tensor, "... e"]:
        """Return x turned; in float32, then in x's type."""
        r = len(self.frequencies)
        wide = x.float()
        if self.pairs == "halves":
            one, two, rest = wide[..., :r], wide[..., r : 2 * r], wide[..., 2 * r :]
            parts = [one * cos - two * sin, two * cos + one * sin]
        else:
            one, two, rest = wide[..., 0 : 2 * r : 2], wide[..., 1 : 2 * r : 2], wide[..., 2 * r :]
            parts = [torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)]
        if rest.shape[-1]:
            parts.append(rest)
        return torch.cat(parts, -1).to(x.dtype)

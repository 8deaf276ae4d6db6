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
        """Return cosines and signed sines (..., 2 r) of turns by whole numbers of positions."""
        angle = shifts.double()[..., None] * self.frequencies.double().to(shifts.device)
        cos, sin = angle.cos().float(), angle.sin().float()
        if self.pairs == "halves":
            return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)

    def turn(
        self, x: Float[Tensor, "... e"], cos: Float[Tensor, "... q"], sin: Float[Tensor, "... q"]
    ) -> Shaped[Tensor, "... e"]:
        """Return x turned by what `angles` gave; in float32, then in x's type."""
        r = len(self.frequencies)
        wide = x.float()
        own = wide if wide.shape[-1] == 2 * r else wide[..., : 2 * r]
        if self.pairs == "halves":
            other = own.roll(r, -1)
        else:
            other = own.unflatten(-1, (r, 2)).flip(-1).flatten(-2)
        turned = torch.addcmul(own * cos, other, sin)
        if turned.shape[-1] < wide.shape[-1]:
            turned = torch.cat([turned, wide[..., 2 * r :]], -1)
        return turned.to(x.dtype)

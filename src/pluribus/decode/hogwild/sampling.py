"""How a worker's next token is drawn."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float


@dataclass(frozen=True)
class Sampling:
    """Temperature (0: the likeliest), then the `top_k` likeliest (0: all), then a share `top_p`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(f"top_k {self.top_k}, top_p {self.top_p}; give k >= 0 and 0 < p <= 1")

    @classmethod
    def of(cls, model: Any) -> "Sampling":
        """Return what the model's generation config asks for."""
        config = getattr(model, "generation_config", None)
        if not getattr(config, "do_sample", False):
            return cls()
        given: dict[str, Any] = {
            name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p")
        }
        given = {"temperature": 1.0} | {n: value for n, value in given.items() if value is not None}
        return cls(**given)

    def draw(self, logits: Float[Tensor, " v"], rng: torch.Generator) -> int:
        """Return a token's number. Tokens of -inf are never drawn."""
        if not self.temperature:
            return int(logits.argmax())
        chances = (logits.double() / self.temperature).softmax(0)
        chances, order = chances.sort(descending=True, stable=True)
        if self.top_k:
            chances[self.top_k :] = 0
        before = chances.cumsum(0) - chances
        chances[before >= self.top_p * chances.sum()] = 0
        return int(order[int(torch.multinomial(chances.cpu(), 1, generator=rng))])

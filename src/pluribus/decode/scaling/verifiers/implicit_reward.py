"""The reward that a tuned model implies: how much likelier it finds the candidate than its base.

Mitchell et al., ICLR 2024, https://arxiv.org/abs/2310.12962; Rafailov et al. 2023:

    r(x, y) / beta = sum_t log tuned(y_t) - log base(y_t),     score = sigmoid(scale r / beta)

One score, of the whole candidate: nobody had to train a verifier. `per_token` divides by the number
of tokens, so that long candidates have no edge.
"""

import math
from typing import TYPE_CHECKING

from pluribus.core.errors import InputError
from pluribus.decode.scaling.interface import Problem
from pluribus.decode.scaling.verifiers import verifier

if TYPE_CHECKING:
    from pluribus.decode.fused import Fused


@verifier("implicit_reward", needs="fused", paper="arXiv:2310.12962")
class ImplicitReward:
    """Scores by a fused model's tuned member and base."""

    def __init__(
        self,
        fused: "Fused",
        *,
        tuned: str | None = None,
        scale: float = 1.0,
        per_token: bool = False,
    ) -> None:
        """Raise InputError for a scale that is not above 0."""
        if not scale > 0:
            raise InputError(f"implicit_reward: scale is {scale}; give more than 0")
        self._fused, self._tuned, self._scale, self._per_token = fused, tuned, scale, per_token

    @classmethod
    def of(cls, model: object) -> "ImplicitReward":
        """Return the verifier of a model. Raises InputError unless it is a fused one with EFT."""
        from pluribus.decode.fused import Fused
        from pluribus.decode.fusers.eft import EFT

        if not isinstance(model, Fused) or not isinstance(model.fuser, EFT):
            raise InputError(
                "implicit_reward compares a tuned model with its base: give a stack with the fuser "
                "eft"
            )
        return cls(model)

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return one score; one half for an empty candidate, which tells nothing."""
        from pluribus.decode._score import tokenizer_of
        from pluribus.decode.emulate import implicit_reward

        text = "".join(candidate)
        ids = tokenizer_of(self._fused)(text, add_special_tokens=False)["input_ids"]
        if not ids:
            return [0.5]
        reward = implicit_reward(self._fused, problem.question, list(ids), tuned=self._tuned)
        reward *= self._scale / (len(ids) if self._per_token else 1)
        return [0.5 * (1 + math.tanh(reward / 2))]  # the sigmoid, without overflow

"""Contrastive decoding: what an expert prefers over an amateur, among what it finds plausible.

Li et al., ACL 2023, https://arxiv.org/abs/2210.15097, equations 2 to 4.

    plausible = {y : p_expert(y) >= alpha max p_expert}
    score(y)  = log p_expert(y) - log p_amateur(y)     on plausible, -inf elsewhere    (b, v)

`temperature` is the amateur's (tau in the paper). Differs from the paper: scores are normalised
over the plausible tokens, so that they are log-probabilities; greedy choices are the same, while
its beams add up scores that are not normalised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.merger import Fraction, Positive
from pluribus.core.shapes import Float
from pluribus.decode.fusers import Fusion, fuser, has_roles
from pluribus.decode.fusers._logits import NOTHING, normalised, rows, shift


@fuser("contrastive", paper="arXiv:2210.15097")
@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Expert against amateur."""

    alpha: Fraction = 0.1  # share of the likeliest token's probability that is plausible
    temperature: Positive = 1.0
    expert: str = "expert"
    amateur: str = "amateur"

    def check_roles(self, roles: Sequence[str]) -> None:
        """See `Fuser`."""
        has_roles("contrastive", (self.expert, self.amateur), roles)
        if len(roles) > 2 or self.expert == self.amateur:
            raise InputError(
                f"contrastive takes two models, {self.expert!r} and {self.amateur!r}; given are "
                f"{', '.join(roles)}"
            )

    def __call__(self, logits: Mapping[str, Float[Tensor, "b v"]]) -> Fusion:
        """See `Fuser`."""
        self.check_roles(list(logits))
        known, kept = normalised(logits)
        expert = known[self.expert]
        amateur = (known[self.amateur] / self.temperature).log_softmax(-1)
        plausible = expert >= expert.amax(-1, keepdim=True) + log(self.alpha)
        score = shift(expert, amateur, kept).masked_fill(~plausible, NOTHING)
        weights = {self.expert: rows(1.0, expert), self.amateur: rows(-1.0, expert)}
        info = {"plausible": plausible.sum(-1).to(expert.dtype)}  # tokens
        return Fusion(score.log_softmax(-1), weights, info)

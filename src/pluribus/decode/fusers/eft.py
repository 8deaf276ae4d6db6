"""Emulated fine-tuning: what a model would do had it been tuned as a smaller one was.

Mitchell et al., ICLR 2024, https://arxiv.org/abs/2310.12962, section 3.

    log pi~ = log ref + sum_i w_i (log tuned_i - log base) - log Z          (b, v)

`ref` is the base model at the scale to emulate, `base` the one that was tuned. A tuned model is
optimal for the reward beta log(tuned / base), so w_i = 1 optimises that reward under `ref`; weights
(lambda, 1 - lambda) of two tunings trade one reward for the other. Z sums over one step's
vocabulary: the paper's approximation of the sequence's.

`top_p_filter` keeps a shift only for the tokens of the smallest set with that much mass under `ref`
(`filter_on="base"`) or under the tuned model itself; other tokens keep `ref`'s log-probability
before normalising. The paper describes the idea; this rule and its default (off) are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.merger import Fraction
from pluribus.core.shapes import Bool, Float
from pluribus.decode.fusers import Fusion, check_finite, fuser, has_roles, per_role
from pluribus.decode.fusers._logits import normalised, rows, shift, shifted, without


@fuser("eft", paper="arXiv:2310.12962")
@dataclass(frozen=True, kw_only=True)
class EFT:
    """Every role but `ref` and `base` is a tuned model. ref="base": the scale stays the base's."""

    weights: float | dict[str, float] = 1.0  # one for all, or one for each tuned model
    top_p_filter: Fraction | None = None
    filter_on: Literal["base", "tuned"] = "base"
    exclude: tuple[int, ...] = ()  # ids at which tuned models have no say
    ref: str = "ref"
    base: str = "base"

    def check(self) -> None:
        """Raise InputError for weights that are not finite."""
        check_finite("eft", "weights", self.weights)

    def tuned(self, roles: Sequence[str]) -> list[str]:
        """Return the roles that are tuned models, in their order."""
        return [role for role in roles if role not in (self.ref, self.base)]

    def check_roles(self, roles: Sequence[str]) -> None:
        """See `Fuser`. A missing `ref` is refused, unless `ref` is said to be the base."""
        has_roles("eft", (self.base,), roles)
        if self.ref not in roles:
            raise InputError(
                f"eft has no model in the role {self.ref!r}, the base at the scale to emulate; "
                f"give it, or say ref={self.base!r} if that is the base which was tuned"
            )
        if not self.tuned(roles):
            raise InputError(f"eft needs a tuned model beside {self.ref!r} and {self.base!r}")
        per_role("eft", "weights", self.weights, self.tuned(roles))

    def __call__(self, logits: Mapping[str, Float[Tensor, "b v"]]) -> Fusion:
        """See `Fuser`."""
        self.check_roles(list(logits))
        weights = per_role("eft", "weights", self.weights, self.tuned(list(logits)))
        if self.top_p_filter is None and not self.exclude:
            plain = shifted(logits, self.ref, self.base, weights)
            if plain is not None:
                return Fusion(plain, {r: rows(w, plain) for r, w in weights.items()})
        known, kept = normalised(logits)
        ref, base = known[self.ref], known[self.base]
        moved, info = ref, {}
        trusted = None
        if self.top_p_filter is not None and self.filter_on == "base":
            trusted = nucleus(ref, self.top_p_filter)
        for role, weight in weights.items():
            expert = without(known[role], base, self.exclude)
            delta = weight * shift(expert, base, kept)
            if self.top_p_filter is not None and self.filter_on == "tuned":
                trusted = nucleus(known[role], self.top_p_filter)
            if trusted is not None:
                delta = delta.masked_fill(~trusted, 0.0)
                info[f"trusted {role}"] = trusted.sum(-1).to(ref.dtype)  # tokens
            moved = moved + delta
        return Fusion(moved.log_softmax(-1), {r: rows(w, ref) for r, w in weights.items()}, info)


def nucleus(log_probs: Float[Tensor, "*b v"], p: float) -> Bool[Tensor, "*b v"]:
    """Return which tokens make up the smallest set with a mass of at least `p`, in every row."""
    ordered, places = log_probs.sort(dim=-1, descending=True, stable=True)
    mass = ordered.exp()
    before = mass.cumsum(-1) - mass  # of the tokens that are likelier
    return torch.zeros_like(places, dtype=torch.bool).scatter(-1, places, before < p)

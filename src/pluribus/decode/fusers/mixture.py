"""Mixture of experts: a weighted mean of the members' distributions, as a linear opinion pool.

Stone, Annals of Mathematical Statistics 32 (1961).

    log P~ = log sum_i w_i p_i,     w_i >= 0, sum_i w_i = 1          (b, v)

A token that one member rules out keeps what the others give it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float
from pluribus.decode.fusers import Fusion, check_finite, fuser, per_role
from pluribus.decode.fusers._logits import checked, rows


@fuser("mixture", paper="none")
@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Linear pooling; every role is an expert."""

    weights: dict[str, float] | None = None  # None: equal; they are scaled to 1 in all

    def check(self) -> None:
        """Raise InputError for weights that are negative, not finite, or all zero."""
        if self.weights is None:
            return
        check_finite("mixture", "weights", self.weights)
        if min(self.weights.values(), default=0.0) < 0 or sum(self.weights.values()) <= 0:
            raise InputError(
                f"mixture: weights = {self.weights}: shares of a mixture are at least 0, and one "
                "is above 0"
            )

    def check_roles(self, roles: Sequence[str]) -> None:
        """See `Fuser`."""
        if not roles:
            raise InputError("mixture needs a model at least")
        self.shares(roles)

    def shares(self, roles: Sequence[str]) -> dict[str, float]:
        """Return the weight of each role; they sum to 1."""
        given = per_role("mixture", "weights", self.weights or 1.0, roles)
        return {role: weight / sum(given.values()) for role, weight in given.items()}

    def __call__(self, logits: Mapping[str, Float[Tensor, "b v"]]) -> Fusion:
        """See `Fuser`. Raises InputError for a member that rules out every token."""
        self.check_roles(list(logits))
        wide = checked(logits)
        shares = self.shares(list(logits))
        for role, x in wide.items():
            if not bool((x.amax(-1) > -torch.inf).all()):
                raise InputError(f"the model in the role {role!r} rules out every token")
        terms = [wide[role].log_softmax(-1) + log(w) for role, w in shares.items() if w > 0]
        mixed = torch.stack(terms).logsumexp(0)
        return Fusion(mixed, {role: rows(w, mixed) for role, w in shares.items()})

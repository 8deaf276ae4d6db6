"""Product of experts: a weighted geometric mean of the members' distributions.

Hinton, Neural Computation 14 (2002), equation 1; as a logarithmic opinion pool, Heskes, NIPS 1997.

    log P~ = sum_i w_i log p_i - log Z          (b, v)

By default w_i = 1/n, the pool; w_i = 1 is Hinton's product. A token that one member rules out is
ruled out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float
from pluribus.decode.fusers import Fusion, check_finite, fuser, per_role
from pluribus.decode.fusers._logits import NOTHING, normalised, rows


@fuser("product", paper="none")
@dataclass(frozen=True, kw_only=True)
class Product:
    """Log-linear pooling; every role is an expert."""

    weights: float | dict[str, float] | None = None  # None: equal, and 1 in all

    def check(self) -> None:
        """Raise InputError for weights that are not finite."""
        if self.weights is not None:
            check_finite("product", "weights", self.weights)

    def check_roles(self, roles: Sequence[str]) -> None:
        """See `Fuser`."""
        if not roles:
            raise InputError("product needs a model at least")
        self.shares(roles)

    def shares(self, roles: Sequence[str]) -> dict[str, float]:
        """Return the weight of each role."""
        weights = 1 / len(roles) if self.weights is None else self.weights
        return per_role("product", "weights", weights, roles)

    def __call__(self, logits: Mapping[str, Float[Tensor, "b v"]]) -> Fusion:
        """See `Fuser`."""
        self.check_roles(list(logits))
        known, kept = normalised(logits)
        first = next(iter(known.values()))
        total = first.new_zeros(first.shape)
        for role, weight in self.shares(list(logits)).items():
            own = known[role] if kept is None else known[role].masked_fill(~kept, 0.0)
            total = total + weight * own
        if kept is not None:
            total = total.masked_fill(~kept, NOTHING)
        weights = {role: rows(w, first) for role, w in self.shares(list(logits)).items()}
        return Fusion(total.log_softmax(-1), weights)

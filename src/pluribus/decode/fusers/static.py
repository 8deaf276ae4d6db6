"""Static fusion: a large model moved by what tuning did to small ones, with fixed weights.

Liu et al., Tuning Language Models by Proxy, COLM 2024, https://arxiv.org/abs/2401.08565, section 2;
with the weight of one expert at 1 also EFT (https://arxiv.org/abs/2310.12962).

    log P~ = log P + sum_t alpha_t (log Q_t - log Q) - log Z        (b, v)

P large model, Q small base, Q_t experts tuned from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float
from pluribus.decode.fusers import Fusion, check_finite, fuser, has_roles, per_role
from pluribus.decode.fusers._logits import normalised, rows, shift, shifted, without


@fuser("static", paper="arXiv:2401.08565")
@dataclass(frozen=True, kw_only=True)
class StaticFusion:
    """Fixed weights; every role but `large` and `base` is an expert."""

    alpha: float | dict[str, float] = 1.0  # one for all, or one for each expert
    exclude: tuple[int, ...] = ()  # ids at which experts have no say
    large: str = "large"
    base: str = "base"

    def check(self) -> None:
        """Raise InputError for weights that are not finite."""
        check_finite("static", "alpha", self.alpha)

    def experts(self, roles: Sequence[str]) -> list[str]:
        """Return the roles that are experts, in their order."""
        return [role for role in roles if role not in (self.large, self.base)]

    def check_roles(self, roles: Sequence[str]) -> None:
        """See `Fuser`."""
        has_roles("static", (self.large, self.base), roles)
        if not self.experts(roles):
            raise InputError(f"static needs an expert beside {self.large!r} and {self.base!r}")
        per_role("static", "alpha", self.alpha, self.experts(roles))

    def __call__(self, logits: Mapping[str, Float[Tensor, "b v"]]) -> Fusion:
        """See `Fuser`."""
        self.check_roles(list(logits))
        alphas = per_role("static", "alpha", self.alpha, self.experts(list(logits)))
        if not self.exclude:
            plain = shifted(logits, self.large, self.base, alphas)
            if plain is not None:
                return Fusion(plain, {r: rows(a, plain) for r, a in alphas.items()})
        known, kept = normalised(logits)
        large, base = known[self.large], known[self.base]
        moved = large
        for role, alpha in alphas.items():
            expert = without(known[role], base, self.exclude)
            moved = moved + alpha * shift(expert, base, kept)
        return Fusion(moved.log_softmax(-1), {r: rows(a, large) for r, a in alphas.items()})

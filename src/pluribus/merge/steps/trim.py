"""Keep each expert's largest updates by magnitude, zero the others (TIES, section 3, step 1).

Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708.

    values_t, zeroed outside the top `density` of |values_t|     (t, n) -> (t, n)

`scope`, `count`: as in `pluribus.merge.ties`, with the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pluribus.core.arrays import Array, Float, column
from pluribus.core.chain import step
from pluribus.core.merger import At, FractionPerExpert, Scope, Stage
from pluribus.core.order import Order, Ranked, Selection, TopK, share_of


def sizes(values: Array) -> Array:
    """Magnitudes of a step's values."""
    return abs(values)


@step("trim", kind="each", paper="arXiv:2306.01708")
@dataclass(frozen=True, kw_only=True)
class Trim:
    """Zero all but the largest."""

    density: FractionPerExpert = 0.2  # share of coordinates each expert keeps
    scope: Scope = "tensor"
    count: Literal["exact", "official"] = "exact"

    def folds(self) -> Sequence[Stage]:
        """Ask for each expert's cut."""
        official = self.count == "official"
        kind = Order if official else TopK
        ranks = share_of(self.density, official=official)
        return [{"cut": kind(of=sizes, ranks=ranks, scope=self.scope)}]

    def __call__(
        self, values: Float[Array, "t ..."], *, at: At, cut: Selection | Ranked
    ) -> Float[Array, "t ..."]:
        """Trim one block."""
        size = abs(values)
        if isinstance(cut, Selection):
            return values * cut.mask(size, at)
        return values * (size >= column(tuple(cut.values[:, 0].tolist()), values))

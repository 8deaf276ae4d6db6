"""Drop each expert's largest updates as outliers, then keep the `density` largest of the rest.

Davari and Belilovsky, ECCV 2024, https://arxiv.org/abs/2312.06795 (Model Breadcrumbs).

    ranks by |values_t| from 1, the largest:
    keep ranks int(gamma n) + 1 ... int(gamma n) + int(density n)     (t, n) -> (t, n)

Of n entries there are at most n: a density of 1 keeps all, outliers too.
Ties go by position, so the counts are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pluribus.core.arrays import Array, Float
from pluribus.core.chain import step
from pluribus.core.merger import At, FractionPerExpert, Scope, SharePerExpert, Stage
from pluribus.core.order import Selection, TopK
from pluribus.core.sparse import band
from pluribus.merge.steps.trim import sizes


@step("band", kind="each", paper="arXiv:2312.06795")
@dataclass(frozen=True, kw_only=True)
class Band:
    """Keep a band of magnitudes."""

    density: FractionPerExpert = 0.9  # share of coordinates each expert keeps
    gamma: SharePerExpert = 0.01  # share dropped at the top
    scope: Scope = "tensor"

    def folds(self) -> Sequence[Stage]:
        """Ask for both ends of each expert's band."""
        ranks = band(self.density, self.gamma)
        return [{"ends": TopK(of=sizes, ranks=ranks, scope=self.scope)}]

    def __call__(
        self, values: Float[Array, "t ..."], *, at: At, ends: Selection
    ) -> Float[Array, "t ..."]:
        """Keep the band of one block."""
        size = abs(values)
        return values * (ends.mask(size, at, 0) & ~ends.mask(size, at, 1))

"""Drop updates at random and rescale the rest (DARE).

Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099, section 3.

    keep each coordinate of values_t with probability `density`     (t, n) -> (t, n)
    rescale "1/p": divide by density, as the paper does
            "l1":  multiply by ||values_t||_1 / ||kept values_t||_1 of the tensor, as mergekit does
            "none": leave the rest as it is

Chance depends on the seed, the tensor's name, `stream`, the expert's number and the coordinate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pluribus.core.arrays import Array, Float, column
from pluribus.core.chain import step
from pluribus.core.fold import Sum
from pluribus.core.merger import At, FractionPerExpert, Scope, Stage
from pluribus.core.sparse import drawn, l1_factors
from pluribus.merge.steps.trim import sizes


@step("drop", kind="each", paper="arXiv:2311.03099", random=True)
@dataclass(frozen=True, kw_only=True)
class Drop:
    """Zero at random."""

    density: FractionPerExpert = 0.5  # probability to stay
    rescale: Literal["1/p", "l1", "none"] = "1/p"
    scope: Scope = "tensor"  # of the norms that "l1" keeps
    stream: str = ""  # give two drops of one chain different ones

    def folds(self) -> Sequence[Stage]:
        """Ask for the norms before and after, if they are to be kept."""
        if self.rescale != "l1":
            return []
        kept = Sum(of=self._kept_sizes, scope=self.scope)
        return [{"full": Sum(of=sizes, scope=self.scope), "kept": kept}]

    def _kept(self, values: Array, at: At) -> Array:
        if self.stream:
            at = at._replace(name=f"{at.name}\0{self.stream}")
        return values * drawn(self.density, values, at)

    def _kept_sizes(self, values: Array, *, at: At) -> Array:
        return abs(self._kept(values, at))

    def __call__(
        self,
        values: Float[Array, "t ..."],
        *,
        at: At,
        full: np.ndarray | None = None,
        kept: np.ndarray | None = None,
    ) -> Float[Array, "t ..."]:
        """Drop from one block."""
        out = self._kept(values, at)
        if self.rescale == "1/p":
            return out / column(self.density, values)
        if full is None or kept is None:
            return out
        return out * column(l1_factors(full, kept), values)

"""Elect a sign per coordinate and zero the updates of the other sign (TIES, section 3, step 2).

Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708, and the variants of its code.

    gamma = sign(sum_t v_t(w_t values_t))                       (n,)
    values_t where its sign is gamma, else 0                    (t, n) -> (t, n)

`by="mass"`: v is the value itself. `"signs"`: one vote each, w_t sign(values_t). `"normmass"`: a
vote weighs the coordinate's share of its expert's squared norm. `"normfrac"`: the expert with
the largest such share decides alone, the first of equals. `tie`: as in `pluribus.merge.ties`, or
always "negative". `scope` says over what the norms run; the majority of `tie="global"` is always
the model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.chain import step
from pluribus.core.fold import Sum
from pluribus.core.merger import At, PerExpert, Scope, Stage
from pluribus.core.sparse import add_up, agreeing


def squares(values: Array) -> Array:
    """Squared values of a step."""
    return values * values


@step("elect", kind="each", paper="arXiv:2306.01708")
@dataclass(frozen=True, kw_only=True)
class Elect:
    """Keep what has the elected sign."""

    by: Literal["mass", "signs", "normmass", "normfrac"] = "mass"
    weight: PerExpert = 1.0  # of each expert's vote
    tie: Literal["positive", "negative", "global"] = "positive"
    scope: Scope = "model"

    def folds(self) -> Sequence[Stage]:
        """Ask for norms, and for the model's majority sign, where they are needed."""
        out: list[Stage] = []
        if self.by.startswith("norm"):
            out.append({"norms": Sum(of=squares, scope=self.scope)})
        if self.tie == "global":
            out.append({"majority": Sum(of=self._signs, scope="model")})
        return out

    def _votes(self, values: Array, norms: np.ndarray | None) -> Array:
        """Sum of the votes of one block, (*n,)."""
        xp = namespace(values)
        weighted = values * column(self.weight, values)
        if norms is None:
            votes = weighted if self.by == "mass" else xp.sign(values) * column(self.weight, values)
        else:
            # 1 / norm before the product: a share of a large model's norm underflows nowhere.
            unit = weighted * column(
                tuple((1 / np.sqrt(np.where(norms, norms, 1))).tolist()), values
            )
            votes = unit * abs(unit)
        if self.by != "normfrac":
            return add_up(votes)
        largest = votes[0]
        for row in votes[1:]:
            largest = xp.where(abs(row) > abs(largest), row, largest)
        return largest

    def _signs(self, values: Array, *, norms: np.ndarray | None = None) -> Array:
        return namespace(values).sign(self._votes(values, norms))[None]

    def __call__(
        self,
        values: Float[Array, "t ..."],
        *,
        at: At,
        norms: np.ndarray | None = None,
        majority: np.ndarray | None = None,
    ) -> Float[Array, "t ..."]:
        """Elect in one block."""
        xp = namespace(values)
        total = self._votes(values, norms)
        default = -1.0 if self.tie == "negative" else 1.0
        if majority is not None:
            default = float(np.sign(majority[0]))
        sign = xp.where(total == 0, default, xp.sign(total))
        return values * agreeing(values, sign)

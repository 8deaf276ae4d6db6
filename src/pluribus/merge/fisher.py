"""Fisher merging: average the experts, each coordinate by how much it matters to each.

Matena and Raffel, NeurIPS 2022, https://arxiv.org/abs/2111.09832, equation 2.

    theta = sum_t c_t (F_t + floor) theta_t / sum_t c_t (F_t + floor)           (n,)
    c_t   = w_t, with `normalize` divided by (||F_t|| + floor) over the whole model

F_t is the diagonal Fisher information of expert t, weights of the same names and shapes
(`pluribus.calibrate.fisher` measures it). A tensor without one, such as a running mean, is averaged
by w_t alone. `floor` keeps the divisor from zero; Fishers far below it make a plain average, so
lower it for large models, whose gradients are small.

Deviates from FusionBench: the norm is over all tensors that have a Fisher, in float64; a
coordinate whose divisor is zero is averaged by w_t. Cost: one pass, two with `normalize`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.arrays import Array, Float, column, namespace, per_expert
from pluribus.core.errors import InputError
from pluribus.core.fold import Gram
from pluribus.core.merger import NonNegative, PerExpert, Stage, merger


@merger("fisher", paper="arXiv:2111.09832", base="ignored", needs=("fisher",))
@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Fisher-weighted average."""

    weight: PerExpert = 1.0  # relative share of each expert
    normalize: bool = True  # let every expert's Fisher weigh the same in sum
    floor: NonNegative = 1e-6

    def check(self) -> None:
        """Raise InputError for weights that make the divisor cross zero."""
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        if min(weights) < 0 or max(weights) == 0:
            raise InputError(
                f"fisher: weight = {self.weight}: weights must not be negative, nor all zero"
            )

    def folds(self) -> Sequence[Stage]:
        """Ask for the norm of each expert's Fisher over the model."""
        return [{"norms": Gram(of=_fishers, scope="model")}] if self.normalize else []

    def __call__(
        self,
        base: Array | None,
        experts: Float[Array, "t n"],
        *,
        fisher: Float[Array, "t n"] | None = None,
        norms: np.ndarray | None = None,
    ) -> Float[Array, " n"]:
        """Average one block."""
        xp = namespace(experts)
        shares = np.asarray(per_expert(self.weight, experts.shape[0]))
        plain = column(tuple((shares / shares.sum()).tolist()), experts)
        if fisher is None:
            importance, divisor = plain, plain.sum() * 0 + 1
        else:
            if norms is not None:
                size = np.sqrt(np.diag(norms)) + self.floor
                scaled = np.divide(shares, size, out=np.zeros_like(size), where=size > 0)
                shares = scaled if scaled.sum() > 0 else shares
            importance = (fisher + self.floor) * column(
                tuple((shares / shares.sum()).tolist()), experts
            )
            divisor = importance[0]
            for row in importance[1:]:
                divisor = divisor + row
            empty = divisor == 0
            importance = xp.where(empty, plain, importance)
            divisor = xp.where(empty, 1.0, divisor)
        # Differences from the first expert: equal experts come back to the bit.
        pull = experts[0] * 0
        for row, expert in zip(importance[1:], experts[1:], strict=True):
            pull = pull + row * (expert - experts[0])
        return experts[0] + pull / divisor


def _fishers(base: Array | None, experts: Array, *, fisher: Array | None = None) -> Array:
    return experts * 0 if fisher is None else fisher

"""PCB-Merging: every parameter of every expert gets a coefficient from how parameters compete.

Du et al., NeurIPS 2024, https://arxiv.org/abs/2410.02396, and the authors' code.

    A     = |tau_t| clamped to its `clip` and 1 - `clip` quantiles; M = sign(tau_t) A    (t, n)
    intra = exp(T minmax(A)^2)                       importance within the task
    inter = tanh(tau_t sum_t tau_t)                  agreement with the other tasks
    S     = minmax(intra inter, clamped from below to its (1 - ratio) quantile)          (t, n)
    theta = theta_0 + sum_t S_t scale_t M_t / max(sum_t S_t, 1e-12)                      (n,)

minmax(x) = (x - min x) / (max x - min x). Quantiles, minima and maxima are an expert's over the
whole model, as published, or each tensor's with `scope="tensor"` (ours, for models whose layers
differ by orders of magnitude). The three published codes differ: `variant="paper-code"` clips 1e-4,
"nlp" 0.01, "vision" 0.01 and takes tanh(tau_t sum_t sign(tau_t) minmax(A_t)) for inter. The k-th
smallest values are the codes': int(clip n) and int((1 - clip) n - 1), int((1 - ratio) n), from 0.

Deviates from the code: intra is divided by e^T, a factor of each row that minmax removes and that
overflows float32 from 89 experts on; where all that is kept is equal (tanh saturates), S is 1 there
and not 0/0; an expert without any spread of magnitudes is an error, or takes no part with
`drop_unchanged` (and in a tensor of `scope="tensor"`, where frozen tensors are common). A
coordinate kept by one expert alone moves by its full scale, however small its score: scales do not
compare with those of other methods. With one expert this only trims.

Cost: exact quantiles of |tau| and of the scores: one to three passes each, then the merge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval

from pluribus.core.arrays import Array, Float, column, namespace
from pluribus.core.errors import InputError
from pluribus.core.fold import magnitudes
from pluribus.core.merger import Fraction, PerExpert, Scope, Stage, merger
from pluribus.core.order import Order, Ranked

Variant = Literal["paper-code", "nlp", "vision"]
CLIPS = {"paper-code": 1e-4, "nlp": 0.01, "vision": 0.01}


@merger("pcb", paper="arXiv:2410.02396", idempotent=False)
@dataclass(frozen=True, kw_only=True)
class PCB:
    """Competition-balanced average of task vectors."""

    ratio: Fraction = 0.1  # share of coordinates each expert keeps
    scale: PerExpert = 1.2  # lambda
    clip: Annotated[float, Interval(ge=0, lt=0.5)] | None = None  # None: the variant's
    variant: Variant = "paper-code"
    scope: Scope = "model"
    drop_unchanged: bool = False  # leave out experts whose update has no spread

    def _clip_ranks(self, size: int, rows: int) -> np.ndarray:
        clip = CLIPS[self.variant] if self.clip is None else self.clip
        low, high = int(size * clip), int(size * (1 - clip) - 1)
        return np.tile(np.array([size - low, size - max(high, 0)], np.int64), (rows, 1))

    def _keep_ranks(self, size: int, rows: int) -> np.ndarray:
        if self.scope == "model" and size * self.ratio < 1:
            raise InputError(
                f"pcb: ratio = {self.ratio} keeps none of the model's {size} coordinates"
            )
        # A tensor's largest score always stands out from what it drops.
        low = min(int(size * (1 - self.ratio)), max(size - 2, 0))
        return np.tile(np.array([size - low, 1], np.int64), (rows, 1))

    def folds(self) -> Sequence[Stage]:
        """Ask for the quantiles of the magnitudes, then for those of the scores."""
        return [
            {"clips": Order(of=magnitudes, ranks=self._clip_ranks, scope=self.scope)},
            {"cut": Order(of=self._balance, ranks=self._keep_ranks, scope=self.scope, signed=True)},
        ]

    def _taking_part(self, clips: Ranked) -> np.ndarray:
        """Which experts have a spread of magnitudes, (t,). Raises InputError if one must."""
        part = clips.values[:, 1] > clips.values[:, 0]
        if not part.all() and self.scope == "model" and not self.drop_unchanged:
            number = int(np.argmin(part)) + 1
            raise InputError(
                f"pcb: the update of expert {number} of {part.size} has the same magnitude almost "
                "everywhere (is it equal to the base, or frozen?), so its scores are 0/0; leave it "
                "out, or set drop_unchanged: true"
            )
        return part

    def _clipped(self, size: Array, clips: Ranked) -> Array:
        low, high = (column(tuple(clips.values[:, j].tolist()), size) for j in (0, 1))
        xp = namespace(size)
        return xp.minimum(xp.maximum(size, low), high)

    def _balance(self, base: Array, experts: Array, *, clips: Ranked) -> Array:
        """Scores before the cut, intra * inter, (t, n)."""
        xp = namespace(base)
        part = self._taking_part(clips)
        tau = experts - base
        low = clips.values[:, 0]
        span = np.where(part, clips.values[:, 1] - low, 1)
        within = self._clipped(abs(tau), clips) - column(tuple(low.tolist()), tau)
        within = within / column(tuple(span.tolist()), tau)
        sharing = tau * column(tuple(part.astype(float).tolist()), tau)
        pull = xp.sign(sharing) * within if self.variant == "vision" else sharing
        total = pull[0]
        for row in pull[1:]:
            total = total + row
        intra = xp.exp(float(part.sum()) * (within * within - 1))
        return intra * xp.tanh(tau * total)

    def scores(
        self, base: Array, experts: Array, *, clips: Ranked, cut: Ranked
    ) -> Float[Array, "t n"]:
        """Return S of one block: each expert's coefficients, 0 where it was dropped."""
        xp = namespace(base)
        part = self._taking_part(clips)
        balance = self._balance(base, experts, clips=clips)
        low, high = cut.values[:, 0], cut.values[:, 1]
        flat = high <= low
        kept = xp.maximum(balance - column(tuple(low.tolist()), balance), balance * 0)
        kept = kept / column(tuple(np.where(flat, 1, high - low).tolist()), balance)
        rows = []
        for i in range(part.size):
            if not part[i]:
                rows.append(kept[i] * 0)
            elif flat[i]:
                rows.append((balance[i] >= float(high[i])) * (abs(kept[i]) * 0 + 1))
            else:
                rows.append(kept[i])
        return xp.stack(rows)

    def __call__(
        self,
        base: Float[Array, " n"],
        experts: Float[Array, "t n"],
        *,
        clips: Ranked,
        cut: Ranked,
    ) -> Float[Array, " n"]:
        """Merge one block. Raises InputError for an expert whose scores would be 0/0."""
        xp = namespace(base)
        tau = experts - base
        scores = self.scores(base, experts, clips=clips, cut=cut)
        update = xp.sign(tau) * self._clipped(abs(tau), clips) * column(self.scale, experts)
        total, divisor = base * 0, base * 0
        for row, score in zip(update, scores, strict=True):
            total = total + row * score
            divisor = divisor + score
        return base + total / xp.maximum(divisor, base * 0 + 1e-12)

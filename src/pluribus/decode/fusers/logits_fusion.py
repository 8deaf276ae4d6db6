"""Dynamic logits fusion: the weight of an expert's shift is found anew for every token.

Fan et al., On Giant's Shoulders, NeurIPS 2024, https://arxiv.org/abs/2406.15480, equations 2 to 5.

    P~(a) = softmax(log P + sum_t a_t D_t),   D_t = log Q_t - log Q                       (b, v)
    a* = argmin_a sum_t (KL(P~||P) - KL(Q_t||Q))^2 + (KL(P||P~) - KL(Q||Q_t))^2           (t,)

P large model, Q small base, Q_t expert. With A = logsumexp(log P + sum_t a_t D_t) both distances
are closed forms, so that a candidate costs one logsumexp and one expectation:

    KL(P~||P) = E_P~[sum_t a_t D_t] - A        KL(P||P~) = A - E_P[sum_t a_t D_t]

`one_hot` (the paper's) tries c e_t for every c of the grid and every expert t, zero first, and
keeps the first that is best; `joint` tries the whole product of grids. `bracket` is `one_hot` with
a finer c: from the best place of each expert's grid, ever closer places on both sides are tried,
down to a hundredth of its step.

There is no code of the authors'. Theirs prints a running minimum that is set once before the loop
over steps; here every step and row has its own. Their appendix swaps the two targets; the main
text's order is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from pluribus.core.errors import InputError, nearest
from pluribus.core.shapes import Float
from pluribus.decode.fusers import Fusion, fuser, has_roles
from pluribus.decode.fusers._distances import Distances, distances, straight
from pluribus.decode.fusers._logits import normalised, widened, without
from pluribus.decode.fusers._search import Candidates, bracketed, searched

MOST = 20_000  # candidates of a joint search
TRIED = {
    "one_hot": "one expert at a time, c from the grid, zero first",
    "joint": "all products of the grid",
    "bracket": "one expert at a time, c ever closer around the best of the grid",
}


@fuser("logits_fusion", paper="arXiv:2406.15480")
@dataclass(frozen=True, kw_only=True)
class DynamicFusion:
    """Weights by matching KL distances; every role but `large` and `base` is an expert."""

    mode: Literal["one_hot", "joint", "bracket"] = "one_hot"
    grid: tuple[float, float, float] = (0.0, 2.0, 0.1)  # lowest, highest, step
    bounds: dict[str, tuple[float, float]] | None = None  # lowest and highest of an expert
    targets: Literal["all", "selected"] = "all"  # whose distances a candidate is held to
    exclude: tuple[int, ...] = ()  # ids at which experts have no say
    large: str = "large"
    base: str = "base"

    def check(self) -> None:
        """Raise InputError for a grid that is empty, and for bounds that leave nothing of it."""
        low, high, step = self.grid
        if not np.isfinite(self.grid).all() or step <= 0 or high < low:
            raise InputError(
                f"logits_fusion: grid = {self.grid}: expected lowest, highest and a step above 0, "
                "as in (0.0, 2.0, 0.1)"
            )
        if self.mode == "bracket" and low < 0:
            raise InputError("logits_fusion: a bracketing search needs a grid of c >= 0")
        if self.mode == "joint" and self.targets == "selected":
            raise InputError("logits_fusion: a joint search selects no expert; use targets='all'")
        for role, (lowest, highest) in (self.bounds or {}).items():
            if not ((self.values >= lowest) & (self.values <= highest)).any():
                raise InputError(
                    f"logits_fusion: bounds of {role} are [{lowest}, {highest}], which holds no "
                    f"value of the grid {self.grid}"
                )

    @property
    def values(self) -> np.ndarray:
        """The grid's values in order, without the drift of repeated addition."""
        low, high, step = self.grid
        return np.round(low + step * np.arange(int((high - low) / step + 1e-9) + 1), 12)

    def experts(self, roles: Sequence[str]) -> list[str]:
        """Return the roles that are experts, in their order."""
        return [role for role in roles if role not in (self.large, self.base)]

    def check_roles(self, roles: Sequence[str]) -> None:
        """See `Fuser`. Raises InputError also for a joint search that would be too large."""
        has_roles("logits_fusion", (self.large, self.base), roles)
        experts = self.experts(roles)
        if not experts:
            raise InputError(
                f"logits_fusion needs an expert beside {self.large!r} and {self.base!r}"
            )
        for role in self.bounds or {}:
            if role not in experts:
                raise InputError(
                    f"logits_fusion: bounds are given for {role!r}; experts are "
                    f"{', '.join(experts)}.{nearest(role, experts)}"
                )
        if self.mode == "joint" and len(self.values) ** len(experts) > MOST:
            raise InputError(
                f"logits_fusion: {len(self.values)} values for each of {len(experts)} experts are "
                f"more than {MOST} candidates; use mode='one_hot' or a coarser grid"
            )

    def __call__(self, logits: Mapping[str, Float[Tensor, "b v"]]) -> Fusion:
        """See `Fuser`. `info` has what the candidates were, their loss and the distances."""
        self.check_roles(list(logits))
        experts = self.experts(list(logits))
        measured = self._measured(logits, experts)
        if self.mode == "bracket":
            limits = [self._limits(role) for role in experts]
            weights, loss = bracketed(measured, limits, self.grid[2], self.targets == "selected")
        else:
            weights, loss = searched(measured, self._candidates(experts), self.targets)
        info = {
            "objective": "sum over experts of squared differences of both KL distances",
            "search": f"{self.mode}: {TRIED[self.mode]}",
            "grid": self.grid,
            "targets": self.targets,
            "loss": loss,
            **{
                f"kl {role}": measured.there[t] for t, role in enumerate(experts)
            },  # KL(Q_t || Q), nats
        }
        named = {role: weights[t] for t, role in enumerate(experts)}
        return Fusion(measured.fused(weights), named, info)

    def _measured(
        self, logits: Mapping[str, Float[Tensor, "b v"]], experts: Sequence[str]
    ) -> Distances:
        if not self.exclude:
            wide = widened(logits)
            tuned = [wide[role] for role in experts]
            if (found := straight(wide[self.large], wide[self.base], tuned)) is not None:
                return found
        known, kept = normalised(logits)
        base = known[self.base]
        tuned = [without(known[role], base, self.exclude) for role in experts]
        return distances(known[self.large], base, tuned, kept)

    def _limits(self, role: str) -> tuple[float, float]:
        low, high = (self.bounds or {}).get(role, (self.grid[0], self.grid[1]))
        return max(low, float(self.values[0])), min(high, float(self.values[-1]))

    def _inside(self, role: str) -> np.ndarray:
        low, high = (self.bounds or {}).get(role, (-np.inf, np.inf))
        return self.values[(self.values >= low) & (self.values <= high)]

    def _candidates(self, experts: Sequence[str]) -> Candidates:
        """Return all candidates in the order in which ties are decided."""
        inside = [self._inside(role) for role in experts]
        if self.mode == "joint":
            mesh = np.meshgrid(*inside, indexing="ij")
            table = np.stack([axis.ravel() for axis in mesh], 1)  # (n, t): first expert outermost
            return Candidates(table, np.full(len(table), -1))
        zero = any((values == 0).any() for values in inside)
        moved = [values[values != 0] for values in inside]
        counts = [int(zero), *map(len, moved)]
        selected = np.repeat(np.arange(-1, len(experts)), counts)
        table = np.zeros((len(selected), len(experts)))
        table[np.arange(int(zero), len(table)), selected[int(zero) :]] = np.concatenate(moved)
        return Candidates(table, selected)

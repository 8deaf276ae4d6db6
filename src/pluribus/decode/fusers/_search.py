"""Searches for the weights of `logits_fusion`: over listed candidates, or between two brackets.

Nothing of size candidates x vocabulary is kept: candidates come one after another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pluribus.core.shapes import Float

HALVINGS = 12  # of a bracket: 2 / 2**12 is below a hundredth of the usual step
INSIDE = 9  # places looked at between two brackets
LIMIT = 80.0  # exponents within this stay normal numbers in float32


class Candidates(NamedTuple):
    """Weights to try, in the order in which ties are decided."""

    table: np.ndarray  # (n, t)
    selected: np.ndarray  # (n,): the expert of a one-hot candidate, -1 for none


class Distances(NamedTuple):
    """A large model, the experts' shifts, and the distances that each expert is from its base."""

    large: Float[Tensor, "b v"]  # log P
    deltas: Float[Tensor, "t b v"]  # D_t
    there: Float[Tensor, "t b"]  # KL(Q_t || Q)
    back: Float[Tensor, "t b"]  # KL(Q || Q_t)

    def moved(
        self, delta: Float[Tensor, "b v"], mean: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return KL(P~||P) and KL(P||P~) of a shift whose mean under P is `mean`."""
        scores = self.large + delta
        a = scores.logsumexp(-1)
        return ((scores - a[:, None]).exp() * delta).sum(-1) - a, a - mean

    def loss(
        self, one: Float[Tensor, " b"], other: Float[Tensor, " b"], selected: int
    ) -> Float[Tensor, " b"]:
        """Return the objective over all experts, or over the selected one alone."""
        there = self.there if selected < 0 else self.there[selected : selected + 1]
        back = self.back if selected < 0 else self.back[selected : selected + 1]
        return ((one - there) ** 2 + (other - back) ** 2).sum(0)


def searched(
    known: Distances, candidates: Candidates, targets: str
) -> tuple[Float[Tensor, "t b"], Float[Tensor, " b"]]:
    """Return the first of the best candidates for every row, and its loss."""
    one, other = _all_distances(known, candidates)  # (n, b) each
    losses = (one[:, None] - known.there) ** 2 + (other[:, None] - known.back) ** 2  # (n, t, b)
    if targets == "all":
        loss = losses.sum(1)
    else:  # zero is held to whichever expert suits it best
        chosen = torch.as_tensor(candidates.selected, device=losses.device)
        own = losses[torch.arange(len(chosen), device=losses.device), chosen.clamp(min=0)]
        loss = torch.where((chosen < 0)[:, None], losses.amin(1), own)
    best = loss.argmin(0)  # the first of equals
    table = torch.as_tensor(candidates.table, dtype=loss.dtype, device=loss.device)
    return table[best].T, loss.gather(0, best[None])[0]


def _all_distances(
    known: Distances, candidates: Candidates
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "n b"]]:
    """Return KL(P~||P) and KL(P||P~) of every candidate."""
    p = known.large.exp()
    means = (p * known.deltas).sum(-1)  # (t, b): E_P[D_t]
    zero = known.large.new_zeros(len(p))
    one: list[Tensor] = []
    other: list[Tensor] = []
    number = 0
    while number < len(candidates.table):
        row, t = candidates.table[number], int(candidates.selected[number])
        if t >= 0:
            cs = candidates.table[candidates.selected == t][:, t]
            number += len(cs)
            if _tame(known, t, cs):
                swept = _swept(p, known.deltas[t], cs, means[t])
            else:
                swept = [known.moved(float(c) * known.deltas[t], float(c) * means[t]) for c in cs]
            one += [first for first, _ in swept]
            other += [second for _, second in swept]
            continue
        number += 1
        used = [i for i, c in enumerate(row) if c]
        if not used:
            one.append(zero)
            other.append(zero)
            continue
        weights = torch.as_tensor(row, dtype=p.dtype, device=p.device)
        first, second = known.moved(
            torch.einsum("t,tbv->bv", weights, known.deltas), (weights[:, None] * means).sum(0)
        )
        one.append(first)
        other.append(second)
    return torch.stack(one), torch.stack(other)


def _tame(known: Distances, t: int, cs: np.ndarray) -> bool:
    """Whether P exp(c D) can be had by multiplying: no exponent leaves float32's range."""
    lowest, most = known.large.detach().amin(), known.deltas[t].detach().abs().amax()
    return float(most * float(np.abs(cs).max()) - lowest) < LIMIT


def _swept(
    p: Float[Tensor, "b v"],
    delta: Float[Tensor, "b v"],
    cs: np.ndarray,
    mean: Float[Tensor, " b"],
) -> list[tuple[Float[Tensor, " b"], Float[Tensor, " b"]]]:
    """Return both distances for each c: P exp(c D) goes from one to the next by multiplication.

    Two passes a candidate instead of seven, and no exponential.
    """
    both = torch.stack((torch.ones_like(delta), delta), 1)  # (b, 2, v)
    found: list[tuple[Tensor, Tensor]] = []
    now = p.clone()
    factors: dict[float, Tensor] = {}
    before = 0.0
    for c in cs.tolist():
        gap = round(c - before, 9)
        if gap not in factors:
            factors[gap] = (gap * delta).exp()
        now *= factors[gap]
        before = c
        z, m = torch.bmm(both, now[:, :, None])[:, :, 0].unbind(1)
        a = z.log()
        found.append((c * m / z - a, a - c * mean))
    return found


def bracketed(
    known: Distances, limits: Sequence[tuple[float, float]], selected: bool
) -> tuple[Float[Tensor, "t b"], Float[Tensor, " b"]]:
    """Return one expert's weight for every row, to about a hundredth of a step, and its loss.

    Over all experts the objective of c e_t is that of the mean targets, up to a constant.
    """
    p = known.large.exp()
    best = known.large.new_full(p.shape[:1], torch.inf)
    weights = known.large.new_zeros(known.there.shape)
    if any(low <= 0 <= high for low, high in limits):
        zero = known.large.new_zeros(len(p))
        numbers = range(len(limits)) if selected else (-1,)
        best = torch.stack([known.loss(zero, zero, t) for t in numbers]).amin(0)
    for t, (low, high) in enumerate(limits):
        delta = known.deltas[t]
        mean = (p * delta).sum(-1)
        there = known.there[t] if selected else known.there.mean(0)
        back = known.back[t] if selected else known.back.mean(0)

        def distances(
            c: Float[Tensor, " b"], delta: Tensor = delta, mean: Tensor = mean
        ) -> tuple[Tensor, Tensor]:
            return known.moved(c[:, None] * delta, c * mean)

        ends = []
        for which, target in enumerate((there, back)):
            lower = known.large.new_full((len(p),), low)
            upper = known.large.new_full((len(p),), high)
            for _ in range(HALVINGS):
                middle = (lower + upper) / 2
                short = distances(middle)[which] < target
                lower = torch.where(short, middle, lower)
                upper = torch.where(short, upper, middle)
            # An end of the range is meant exactly: nothing beyond it was asked for.
            ends.append(torch.where(lower == low, lower, torch.where(upper == high, upper, middle)))
        first, last = torch.minimum(*ends), torch.maximum(*ends)
        own, place = torch.full_like(best, torch.inf), first
        for _ in range(2):  # the second time around the best of the first
            width = last - first
            for part in np.linspace(0, 1, INSIDE):
                c = first + float(part) * width
                loss = known.loss(*distances(c), t if selected else -1)
                place = torch.where(loss < own, c, place)
                own = torch.minimum(loss, own)
            near = width / (INSIDE - 1)
            first, last = torch.maximum(first, place - near), torch.minimum(last, place + near)
        better = own < best
        best = torch.where(better, own, best)
        weights[:, better] = 0.0
        weights[t] = torch.where(better, place, weights[t])
    return weights, best

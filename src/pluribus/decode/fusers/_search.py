"""Searches for the weights of `logits_fusion`: over listed candidates, or ever closer to the best.

Nothing of size candidates x vocabulary is kept: candidates come one after another. Along one expert
P exp(c D) goes from one c to the next by multiplication: two passes over the vocabulary a candidate
instead of seven, and no exponential.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pluribus.core.shapes import Float

PLACES = 9  # looked at in each round of a bracketing search
ROUNDS = 4  # after the first: each narrows to a quarter, together to 1/128 of a step on each side
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
        self, one: Float[Tensor, "*n b"], other: Float[Tensor, "*n b"], selected: int
    ) -> Float[Tensor, "*n b"]:
        """Return the objective over all experts, or over the selected one alone."""
        there = self.there if selected < 0 else self.there[selected : selected + 1]
        back = self.back if selected < 0 else self.back[selected : selected + 1]
        pairs = zip(there, back, strict=True)
        return sum(((one - x) ** 2 + (other - y) ** 2 for x, y in pairs), torch.zeros_like(one))


@torch.no_grad()
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
            swept = _listed(known, p, t, cs, means[t])
            one += swept[0].unbind()
            other += swept[1].unbind()
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


def _listed(
    known: Distances, p: Float[Tensor, "b v"], t: int, cs: np.ndarray, mean: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "n b"]]:
    """Return both distances for each c e_t, the same for all rows."""
    delta = known.deltas[t]
    places = torch.as_tensor(cs, dtype=p.dtype, device=p.device)[:, None].expand(-1, len(p))
    if not _tame(known, t, float(np.abs(cs).max())):
        return _apart(known, t, places, mean)
    gaps = np.diff(cs, prepend=0.0).round(9).tolist()
    factors = {gap: (gap * delta).exp() for gap in set(gaps)}
    return _along(p, delta, places, mean, (factors[gap] for gap in gaps))


def _spaced(
    known: Distances,
    p: Float[Tensor, "b v"],
    t: int,
    first: Float[Tensor, " b"],
    last: Float[Tensor, " b"],
    count: int,
    mean: Float[Tensor, " b"],
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "n b"], Float[Tensor, "n b"]]:
    """Return `count` places between two of each row, and both distances there."""
    gap = (last - first) / (count - 1)
    parts = torch.arange(count, dtype=p.dtype, device=p.device)[:, None]
    places = torch.minimum(first + parts * gap, last)
    if not _tame(known, t, float(torch.maximum(first.abs(), last.abs()).max())):
        return places, *_apart(known, t, places, mean)
    delta = known.deltas[t]
    begun, further = (first[:, None] * delta).exp(), (gap[:, None] * delta).exp()
    factors = (further if number else begun for number in range(count))
    return places, *_along(p, delta, places, mean, factors)


def _tame(known: Distances, t: int, most: float) -> bool:
    """Whether P exp(c D) can be had by multiplying: no exponent leaves float32's range."""
    lowest, longest = known.large.amin(), known.deltas[t].abs().amax()
    return float(longest) * most - float(lowest) < LIMIT


def _along(
    p: Float[Tensor, "b v"],
    delta: Float[Tensor, "b v"],
    places: Float[Tensor, "n b"],
    mean: Float[Tensor, " b"],
    factors: Iterable[Float[Tensor, "b v"]],
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "n b"]]:
    """Return both distances at each place; a factor leads there from the one before, or from 0."""
    both = torch.stack((torch.ones_like(delta), delta), 1)  # (b, 2, v)
    now, sums = p.clone(), p.new_empty(len(places), len(p), 2, 1)
    for factor, out in zip(factors, sums, strict=True):
        now *= factor
        torch.bmm(both, now[:, :, None], out=out)
    z, m = sums[..., 0].unbind(2)
    a = z.log()
    return places * m / z - a, a - places * mean


def _apart(
    known: Distances, t: int, places: Float[Tensor, "n b"], mean: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "n b"]]:
    """Return the same, each by itself."""
    moved = [known.moved(c[:, None] * known.deltas[t], c * mean) for c in places]
    one, other = zip(*moved, strict=True)
    return torch.stack(one), torch.stack(other)


@torch.no_grad()
def bracketed(
    known: Distances, limits: Sequence[tuple[float, float]], step: float, selected: bool
) -> tuple[Float[Tensor, "t b"], Float[Tensor, " b"]]:
    """Return one expert's weight for every row, to about a hundredth of a step, and its loss.

    Along each expert, places no further than `step` apart are looked at first, then ever closer
    ones on both sides of the best, each row by itself.
    """
    p = known.large.exp()
    best = known.large.new_full(p.shape[:1], torch.inf)
    weights = known.large.new_zeros(known.there.shape)
    if any(low <= 0 <= high for low, high in limits):
        zero = known.large.new_zeros(len(p))
        numbers = range(len(limits)) if selected else (-1,)
        best = torch.stack([known.loss(zero, zero, t) for t in numbers]).amin(0)
    for t, (low, high) in enumerate(limits):
        mean = (p * known.deltas[t]).sum(-1)
        first, last = known.large.new_full((2, len(p)), low)
        last.fill_(high)
        count = max(PLACES, math.ceil((high - low) / step - 1e-9) + 1)
        own, place = torch.full_like(best, torch.inf), first
        for _ in range(1 + ROUNDS):
            places, *distances = _spaced(known, p, t, first, last, count, mean)
            losses = known.loss(*distances, t if selected else -1)
            lowest, which = losses.min(0)
            place = torch.where(lowest < own, places.gather(0, which[None])[0], place)
            own = torch.minimum(lowest, own)
            gap = (last - first) / (count - 1)
            # An end of the range is meant exactly: nothing beyond it was asked for.
            first, last = (place - gap).clamp(min=low), (place + gap).clamp(max=high)
            count = PLACES
        better = own < best
        best = torch.where(better, own, best)
        weights[:, better] = 0.0
        weights[t] = torch.where(better, place, weights[t])
    return weights, best

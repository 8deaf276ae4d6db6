"""Searches for the weights of `logits_fusion`: over listed candidates, or ever closer to the best.

Nothing of size candidates x vocabulary is kept: candidates come one after another.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pluribus.core.shapes import Float
from pluribus.decode.fusers._distances import Distances

PLACES = 9  # looked at in each round of a bracketing search
FINE = 257  # looked at at once where a series tells all of them
ROUNDS = 4  # after the first: each narrows to a quarter, together to 1/128 of a step on each side


class Candidates(NamedTuple):
    """Weights to try, in the order in which ties are decided."""

    table: np.ndarray  # (n, t)
    selected: np.ndarray  # (n,): the expert of a one-hot candidate, -1 for none


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
    zero = known.means.new_zeros(known.means.shape[1:])
    one: list[Tensor] = []
    other: list[Tensor] = []
    number = 0
    while number < len(candidates.table):
        row, t = candidates.table[number], int(candidates.selected[number])
        if t >= 0:
            cs = candidates.table[candidates.selected == t][:, t]
            number += len(cs)
            for run in _evenly(cs):
                places = torch.as_tensor(run, dtype=zero.dtype, device=zero.device)
                found = known.along(t, places[:, None].expand(-1, len(zero)))
                one += found[0].unbind()
                other += found[1].unbind()
            continue
        number += 1
        used = [i for i, c in enumerate(row) if c]
        if not used:
            one.append(zero)
            other.append(zero)
            continue
        weights = torch.as_tensor(row, dtype=zero.dtype, device=zero.device)
        first, second = known.moved(
            torch.einsum("t,tbv->bv", weights, known.deltas),
            (weights[:, None] * known.means).sum(0),
        )
        one.append(first)
        other.append(second)
    return torch.stack(one), torch.stack(other)


def _evenly(cs: np.ndarray) -> list[np.ndarray]:
    """Cut a list where the gap between neighbours changes; a part of one has no gap."""
    parts, begun = [], 0
    gaps = np.diff(cs).round(9)
    for end in range(2, len(cs)):
        if end - begun > 1 and gaps[end - 1] != gaps[begun]:
            parts.append(cs[begun:end])
            begun = end
    return [*parts, cs[begun:]]


def _spaced(
    first: Float[Tensor, " b"], last: Float[Tensor, " b"], count: int
) -> Float[Tensor, "n b"]:
    """Return `count` places between two of each row."""
    parts = torch.arange(count, dtype=first.dtype, device=first.device)[:, None]
    return torch.minimum(first + parts * ((last - first) / (count - 1)), last)


@torch.no_grad()
def bracketed(
    known: Distances, limits: Sequence[tuple[float, float]], step: float, selected: bool
) -> tuple[Float[Tensor, "t b"], Float[Tensor, " b"]]:
    """Return one expert's weight for every row, to about a hundredth of a step, and its loss.

    Along each expert, places no further than `step` apart are looked at first, then close ones on
    both sides of the best, each row by itself: all at once by a series, or ever closer ones.
    """
    zero = known.means.new_zeros(known.means.shape[1:])
    best = torch.full_like(zero, torch.inf)
    weights = torch.zeros_like(known.there)
    if any(low <= 0 <= high for low, high in limits):
        numbers = range(len(limits)) if selected else (-1,)
        best = torch.stack([known.loss(zero, zero, t) for t in numbers]).amin(0)
    for t, (low, high) in enumerate(limits):
        first, last = torch.full_like(zero, low), torch.full_like(zero, high)
        count = max(PLACES, math.ceil((high - low) / step - 1e-9) + 1)
        own, place = torch.full_like(best, torch.inf), first
        for number in range(1 + ROUNDS):
            places, found = _spaced(first, last, count), None
            if number:
                fine = _spaced(first, last, FINE)
                found = known.around(t, fine)
                places = places if found is None else fine
            told = known.along(t, places) if found is None else found
            losses = known.loss(*told, t if selected else -1)
            lowest, which = losses.min(0)
            place = torch.where(lowest < own, places.gather(0, which[None])[0], place)
            own = torch.minimum(lowest, own)
            if found is not None:
                break
            gap = (last - first) / (count - 1)
            # An end of the range is meant exactly: nothing beyond it was asked for.
            first, last = (place - gap).clamp(min=low), (place + gap).clamp(max=high)
            count = PLACES
        better = own < best
        best = torch.where(better, own, best)
        weights[:, better] = 0.0
        weights[t] = torch.where(better, place, weights[t])
    return weights, best

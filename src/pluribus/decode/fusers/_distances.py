"""How far a large model and its small experts are moved: the numbers that `logits_fusion` matches.

    z(c) = sum_v P exp(c D),  m(c) = sum_v P exp(c D) D
    KL(P~||P) = c m / z - log z        KL(P||P~) = log z - c E_P[D]

At evenly spaced c, P exp(c D) goes from one to the next by multiplication, without an exponential.
Close to a place c_0, all other places follow from its moments M_k = sum_v P exp(c_0 D) D^k:

    z(c_0 + h) = sum_k M_k h^k / k!        m(c_0 + h) = sum_k M_(k+1) h^k / k!

Float32 on a processor goes through compiled passes (`kernels.tilted`); `distances` and `_swept` are
the same in readable form, and what other devices and types take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pluribus.core.shapes import Bool, Float
from pluribus.decode.fusers._logits import shift
from pluribus.kernels import tilted

REACH, EXACT = 3.0, 1e-9  # of a series: the largest |h D|, and its first term that is left out
LIMIT = 80.0  # exponents within this stay normal numbers in float32

Pair = tuple[Float[Tensor, "n b"], Float[Tensor, "n b"]]


@dataclass(frozen=True)
class Distances:
    """A large model, the experts' shifts, and the distances that each expert is from its base."""

    scores: Float[Tensor, "b v"]  # log P, or that and something for each row
    p: Float[Tensor, "b v"]
    deltas: Float[Tensor, "t b v"]  # D_t, 0 where a token is excluded
    means: Float[Tensor, "t b"]  # E_P[D_t]
    there: Float[Tensor, "t b"]  # KL(Q_t || Q)
    back: Float[Tensor, "t b"]  # KL(Q || Q_t)
    lowest: float  # log P
    longest: tuple[float, ...]  # |D_t|, of each expert

    @cached_property
    def large(self) -> Float[Tensor, "b v"]:
        """Log P."""
        return self.scores.log_softmax(-1)

    def fused(self, weights: Float[Tensor, "t b"]) -> Float[Tensor, "b v"]:
        """Return log P + sum_t a_t D_t, normalised."""
        moved = self.scores
        for own, delta in zip(weights, self.deltas, strict=True):
            moved = torch.addcmul(moved, own[:, None], delta)
        return moved.log_softmax(-1)

    def moved(
        self, delta: Float[Tensor, "b v"], mean: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return KL(P~||P) and KL(P||P~) of a shift whose mean under P is `mean`."""
        scores = self.large + delta
        a = scores.logsumexp(-1)
        return ((scores - a[:, None]).exp() * delta).sum(-1) - a, a - mean

    def along(self, t: int, places: Float[Tensor, "n b"]) -> Pair:
        """Return the same for c D_t at places c that are evenly spaced in every row."""
        furthest = float(places[[0, -1]].detach().abs().amax())
        if not self.longest[t] * furthest - self.lowest < LIMIT:  # products would leave the range
            moved = [self.moved(c[:, None] * self.deltas[t], c * self.means[t]) for c in places]
            one, other = zip(*moved, strict=True)
            return torch.stack(one), torch.stack(other)
        first, count = places[0], len(places)
        gap = (places[-1] - first) / max(1, count - 1)
        sums = _compiled_sums if _compiles(self.p) else _swept
        z, m = sums(self.p, self.deltas[t], first, gap, count).unbind(2)
        a = z.log()
        return places * m / z - a, a - places * self.means[t]

    def around(self, t: int, places: Float[Tensor, "n b"]) -> Pair | None:
        """Return the same at close places by the moments of their middle.

        None if the series would be long, or products leave the range.
        """
        first, last = places[0].double(), places[-1].double()
        middle = ((first + last) / 2).to(self.p.dtype)
        reach = self.longest[t] * float(torch.maximum(middle - first, last - middle).max())
        furthest = float(places[[0, -1]].detach().abs().amax())
        if not self.longest[t] * furthest - self.lowest < LIMIT or reach > REACH:
            return None
        terms = next(k for k in range(2, 64) if reach**k < EXACT * math.factorial(k))
        find = _compiled_moments if _compiles(self.p) else _moments
        found = find(self.p, self.deltas[t], middle, terms + 1).double()  # (b, k)
        h = places.double() - middle
        powers = [torch.ones_like(h)]
        for k in range(1, terms):
            powers.append(powers[-1] * h / k)
        series = torch.stack(powers, -1)  # (n, b, k)
        z, m = (series * found[:, :-1]).sum(-1), (series * found[:, 1:]).sum(-1)
        a = z.log()
        pair = places * m / z - a, a - places * self.means[t]
        return pair[0].to(self.p.dtype), pair[1].to(self.p.dtype)

    def loss(
        self, one: Float[Tensor, "*n b"], other: Float[Tensor, "*n b"], selected: int
    ) -> Float[Tensor, "*n b"]:
        """Return the objective over all experts, or over the selected one alone."""
        there = self.there if selected < 0 else self.there[selected : selected + 1]
        back = self.back if selected < 0 else self.back[selected : selected + 1]
        pairs = zip(there, back, strict=True)
        return sum(((one - x) ** 2 + (other - y) ** 2 for x, y in pairs), torch.zeros_like(one))


def distances(
    large: Float[Tensor, "b v"],
    base: Float[Tensor, "b v"],
    tuned: Sequence[Float[Tensor, "b v"]],
    kept: Bool[Tensor, "b v"] | None,
) -> Distances:
    """Measure normalised log-probabilities; `kept` are the tokens that no model excludes."""
    p, deltas, numbers = zip(*(_measured(large, base, one, kept) for one in tuned), strict=True)
    return _gathered(large, p[0], deltas, torch.stack(numbers))


def straight(
    large: Float[Tensor, "b v"], base: Float[Tensor, "b v"], tuned: Sequence[Float[Tensor, "b v"]]
) -> Distances | None:
    """Measure logits as they are, in compiled passes; None for other types or infinite ones."""
    if not all(_compiles(one) for one in (large, base, *tuned)):
        return None
    shared, threads = (_array(large), _array(base)), torch.get_num_threads()
    found = [tilted.compared(*shared, _array(one), threads) for one in tuned]
    p, deltas, told = zip(*found, strict=True)
    if not np.isfinite(told).all():
        return None
    numbers = torch.from_numpy(np.stack(told).transpose(0, 2, 1).astype(np.float32))  # (t, 7, b)
    return _gathered(
        large,
        torch.from_numpy(p[0]),
        [torch.from_numpy(one) for one in deltas],
        numbers[:, :5],
    )


def _gathered(
    large: Float[Tensor, "b v"],
    p: Float[Tensor, "b v"],
    deltas: Sequence[Float[Tensor, "b v"]],
    numbers: Float[Tensor, "t 5 b"],
) -> Distances:
    means, there, back, lowest, longest = numbers.unbind(1)
    ends = float(lowest.detach().amin()), tuple(longest.detach().amax(1).tolist())
    stacked = deltas[0][None] if len(deltas) == 1 else torch.stack(list(deltas))
    return Distances(large, p, stacked, means, there, back, *ends)


def _compiles(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad


def _measured(
    large: Float[Tensor, "b v"],
    base: Float[Tensor, "b v"],
    tuned: Float[Tensor, "b v"],
    kept: Bool[Tensor, "b v"] | None,
) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b v"], Float[Tensor, "5 b"]]:
    """Return P, D, and of each row E_P[D], both distances, the least log P and the largest |D|."""
    p, delta = large.exp(), shift(tuned, base, kept)
    numbers = (
        (p * delta).sum(-1),
        (tuned.exp() * delta).sum(-1),
        -(base.exp() * delta).sum(-1),
        large.amin(-1),
        delta.abs().amax(-1),
    )
    return p, delta, torch.stack(numbers)


def _swept(
    p: Float[Tensor, "b v"],
    delta: Float[Tensor, "b v"],
    first: Float[Tensor, " b"],
    gap: Float[Tensor, " b"],
    count: int,
) -> Float[Tensor, "n b 2"]:
    """Return z and m at `count` places of each row."""
    both = torch.stack((torch.ones_like(delta), delta), 1)  # (b, 2, v)
    now, further = p * (first[:, None] * delta).exp(), (gap[:, None] * delta).exp()
    sums = p.new_empty(count, len(p), 2, 1)
    for number, out in enumerate(sums):
        if number:
            now *= further
        torch.bmm(both, now[:, :, None], out=out)
    return sums[..., 0]


def _compiled_sums(
    p: Float[Tensor, "b v"],
    delta: Float[Tensor, "b v"],
    first: Float[Tensor, " b"],
    gap: Float[Tensor, " b"],
    count: int,
) -> Float[Tensor, "n b 2"]:
    rows = [_array(one) for one in (p, delta, first, gap)]
    found = tilted.sums(*rows, count, threads=torch.get_num_threads())  # type: ignore[misc]
    return torch.from_numpy(found.astype(np.float32)).transpose(0, 1)


def _moments(
    p: Float[Tensor, "b v"], delta: Float[Tensor, "b v"], at: Float[Tensor, " b"], count: int
) -> Float[Tensor, "b k"]:
    """Return sum_v P exp(at D) D^k for k below `count`."""
    now, found = p * (at[:, None] * delta).exp(), []
    for _ in range(count):
        found.append(now.sum(-1))
        now = now * delta
    return torch.stack(found, -1)


def _compiled_moments(
    p: Float[Tensor, "b v"], delta: Float[Tensor, "b v"], at: Float[Tensor, " b"], count: int
) -> Float[Tensor, "b k"]:
    rows = [_array(one) for one in (p, delta, at)]
    return torch.from_numpy(tilted.moments(*rows, count, threads=torch.get_num_threads()))  # type: ignore[misc]


def _array(x: Tensor) -> np.ndarray:
    return x.contiguous().numpy()

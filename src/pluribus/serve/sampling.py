"""The next token of one row: its own temperature, nucleus and stream of chance.

Chance is a number drawn for each token from a generator of the request's own, so what else is in
the batch does not matter (see `core.chance`). Log-probabilities are those of the model, before the
temperature.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pluribus.core import chance
from pluribus.core.shapes import Float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer is drawn. Temperature 0 takes the likeliest token."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_end: bool = False  # write on after an end token

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0 or self.top_p == 0.0


class Likely(NamedTuple):
    """A token with its log-probability in nats, and the likeliest ones at its place."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws one row's tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.chance = torch.Generator()
        if sampling.seed is None:
            self.chance.seed()
        else:
            self.chance.manual_seed(sampling.seed)

    def __call__(self, logits: Float[Tensor, " v"]) -> int:
        """Return the next token."""
        if self.sampling.greedy:
            return int(logits.argmax())
        u = torch.rand(1, generator=self.chance, dtype=torch.float64)
        given = self.sampling
        return int(chance.drawn(logits[None], u, given.temperature, given.top_p))


def likely(logits: Float[Tensor, " v"], token: int, count: int) -> Likely:
    """Return a token's log-probability beside those of the `count` likeliest."""
    found = logits.float().log_softmax(0)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, places = found.topk(min(count, len(found)))
        top = tuple(zip(places.tolist(), values.tolist(), strict=True))
    return Likely(token, float(found[token]), top)


def likely_rows(
    logits: Float[Tensor, "s v"], tokens: Float[Tensor, " s"] | Tensor, count: int
) -> list[Likely]:
    """Return `likely` of several places at once: the token and what was likely there."""
    found = logits.float().log_softmax(-1)
    own = found.gather(1, tokens[:, None].to(found.device))[:, 0].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(own)
    if count:
        values, places = found.topk(min(count, found.shape[1]))
        rows = zip(places.tolist(), values.tolist(), strict=True)
        tops = [tuple(zip(ids, log_probs, strict=True)) for ids, log_probs in rows]
    return [
        Likely(token, log_prob, top)
        for token, log_prob, top in zip(tokens.tolist(), own, tops, strict=True)
    ]

"""Speculative decoding of a `Fused`: one of its roles drafts, the fusion checks; nothing is lost.

Leviathan et al., ICML 2023, https://arxiv.org/abs/2211.17192, algorithm 1; for up-scaled models
Mitchell et al., ICLR 2024, https://arxiv.org/abs/2310.12962, section 5.

    draft y_1..y_k from q (the role's model); one forward of the others gives p (the fusion) there
    accept y_i with min(1, p(y_i) / q(y_i)); else draw from max(0, p - q) / Z and stop
    all accepted: draw one more from p

The draft's own logits are those it drafted with, so that it runs k + 1 times a round and every
other model once. Written tokens have the fusion's distribution exactly, or its greedy choice. `k`
grows by one after a round that was accepted whole, and shrinks by one after any other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pluribus.core.errors import InputError, nearest
from pluribus.core.shapes import Float, Int
from pluribus.decode._cache import FusedCache
from pluribus.decode._members import leaders
from pluribus.decode._prompts import own_prompts
from pluribus.decode._step import fuse, step
from pluribus.decode.fusers.eft import nucleus

if TYPE_CHECKING:
    from pluribus.decode.fused import Fused

LONGEST = 16  # tokens of a draft


@runtime_checkable
class Chance(Protocol):
    """What decides: which token is drawn, and whether a draft is taken."""

    def token(self, probabilities: Float[Tensor, " v"]) -> int:
        """Return a token drawn from a distribution."""
        ...

    def accepts(self, probability: float) -> bool:
        """Return True with this probability."""
        ...


class Drawn:
    """Chance from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def token(self, probabilities: Float[Tensor, " v"]) -> int:
        """See `Chance`."""
        device = self.generator.device
        return int(torch.multinomial(probabilities.to(device), 1, generator=self.generator))

    def accepts(self, probability: float) -> bool:
        """See `Chance`."""
        draw = torch.rand((), generator=self.generator, device=self.generator.device)
        return float(draw) < probability


class Greedy:
    """No chance at all: the likeliest token, and drafts that are it."""

    def token(self, probabilities: Float[Tensor, " v"]) -> int:
        """See `Chance`."""
        return int(probabilities.argmax())

    def accepts(self, probability: float) -> bool:
        """See `Chance`."""
        raise AssertionError("greedy decoding compares tokens")


@dataclass
class Stats:
    """What drafting gained."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    written: int = 0
    forwards: dict[str, int] = field(default_factory=dict)  # by role that runs

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def per_token(self, role: str) -> float:
        """Forward passes of a role's model for each token written; plain decoding has 1."""
        return self.forwards.get(role, 0) / self.written if self.written else 0.0


@dataclass(frozen=True)
class Drafted:
    """What was written: prompt and continuation, and how."""

    sequences: Int[Tensor, "1 n"]
    stats: Stats
    weights: Mapping[str, Float[Tensor, "1 m"]]  # of each written token, by role


@dataclass(frozen=True)
class SpeculativeDecoder:
    """Drafts with the model in the role `draft` of `target`.

    Raises InputError for a role that is not there, and k outside 1 to 16.
    """

    target: "Fused"
    draft: str = "tuned"
    k: int = 5
    adaptive: bool = True

    def __post_init__(self) -> None:
        """Check."""
        if self.draft not in self.target.roles:
            raise InputError(
                f"draft={self.draft!r} is no role of the fused model; there are: "
                f"{', '.join(self.target.roles)}.{nearest(self.draft, self.target.roles)}"
            )
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= LONGEST:
            raise InputError(f"k = {self.k!r} drafted tokens; give 1 to {LONGEST}")

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "1 s"],
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        chance: Chance | None = None,
        member_inputs: Mapping[str, Any] | None = None,
        eos_token_id: int | list[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Drafted:
        """Write after one prompt. Temperature and top_p are the fusion's, after it.

        Sampling takes a `generator` (or `chance`); `on_token` gets each token once it is sure.
        Raises InputError for several rows, a member whose cache cannot forget tokens, or sampling
        without a source of chance.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1 or not input_ids.shape[1]:
            raise InputError(
                f"input_ids are {list(input_ids.shape)}; drafts are of different lengths in "
                "different rows, so give one prompt at a time"
            )
        if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1:
            raise InputError("give max_new_tokens >= 1, temperature > 0 and 0 < top_p <= 1")
        if do_sample and generator is None and chance is None:
            raise InputError("sampling takes a generator=torch.Generator(), seeded as you like")
        if chance is None:
            chance = Drawn(generator) if do_sample and generator is not None else Greedy()
        target = self.target
        own = own_prompts(member_inputs, target.roles, 1)
        ids = input_ids.to(target.device)
        target.fits(ids, None, None, own, max_new_tokens)
        ends = target.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        leader = leaders(target.members_by_role, own, target.roles)
        cache = FusedCache()
        masks = {role: own[role].mask for role in dict.fromkeys(leader.values()) if role in own}
        cache.start(leader, masks, ids.shape[1])
        cache.activate_past_recording()
        run = _Run(target, cache, leader[self.draft], temperature, top_p)
        first = run.prefill(ids, own)
        if not cache.is_croppable:
            stuck = [
                f"{role!r} ({type(one).__name__})"
                for role, one in cache.members.items()
                if not getattr(one, "is_croppable", True)
            ]
            raise InputError(
                f"the cache of {', '.join(stuck) or 'a member'} cannot forget tokens, which "
                "drafting needs; use generate()"
            )
        written = [chance.token(first)]
        k = self.k
        for token in written:
            if on_token is not None:
                on_token(token)
        while len(written) < max_new_tokens and written[-1] not in ends:
            drafts = min(k, max_new_tokens - len(written) - 1)
            new = run.round(written[-1], drafts, chance)
            whole = len(new) == drafts + 1
            for token in new:
                written.append(token)
                if on_token is not None:
                    on_token(token)
                if token in ends:
                    break
            if self.adaptive:
                k = min(k + 1, LONGEST) if whole else max(k - 1, 1)
        run.stats.written = len(written)
        tail = torch.tensor([written], dtype=ids.dtype, device=ids.device)
        weights = {name: w[:, : len(written)] for name, w in cache.recorded().items()}
        return Drafted(torch.cat((ids, tail), 1), run.stats, weights)


class _Run:
    """One text as it grows. All caches have read all of it but its last token."""

    def __init__(
        self, target: "Fused", cache: FusedCache, draft: str, temperature: float, top_p: float
    ) -> None:
        self.target, self.cache, self.draft = target, cache, draft
        self.temperature, self.top_p = temperature, top_p
        self.stats = Stats()

    def prefill(self, ids: Int[Tensor, "1 s"], own: Mapping[str, Any]) -> Float[Tensor, " v"]:
        """Read the prompts, and return the fusion's distribution of the first token."""
        found = {role: self._step(role, ids, own, 1) for role in self._running}
        self.cache.length = ids.shape[1]
        return self._fused(found)[0]

    @property
    def _running(self) -> list[str]:
        return list(dict.fromkeys(self.cache.leader.values()))

    def round(self, last: int, k: int, chance: Chance) -> list[int]:
        """Draft k tokens after `last`, check them, and return those that stand and one more."""
        ids = torch.tensor([[last]], device=self.target.device)
        drafts: list[int] = []
        qs: list[Tensor] = []
        parts = [self._step(self.draft, ids, {}, 0)]
        for _ in range(k):
            qs.append(self._warped(parts[-1][0, -1].float().log_softmax(-1)))
            drafts.append(chance.token(qs[-1]))
            parts.append(self._step(self.draft, ids.new_tensor([[drafts[-1]]]), {}, 0))
        whole = ids.new_tensor([[last, *drafts]])
        found = {
            role: self._step(role, whole, {}, 0) for role in self._running if role != self.draft
        }
        found[self.draft] = torch.cat(parts, 1)
        self.cache.length += k + 1
        ps = self._fused(found)  # (k + 1, v)
        taken = 0
        while taken < k:
            token, p, q = drafts[taken], ps[taken], qs[taken].to(ps.device)
            if not stands(token, p, q, chance):
                break
            taken += 1
        if taken == k or isinstance(chance, Greedy):
            extra = chance.token(ps[taken])
        else:
            extra = chance.token(residual(ps[taken], qs[taken].to(ps.device)))
        self.cache.crop(taken - k)
        self.stats.rounds += 1
        self.stats.drafted += k
        self.stats.accepted += taken
        return [*drafts[:taken], extra]

    def _step(
        self, role: str, ids: Int[Tensor, "1 s"], own: Mapping[str, Any], keep: int
    ) -> Float[Tensor, "1 k v"]:
        self.stats.forwards[role] = self.stats.forwards.get(role, 0) + 1
        return step(self.target, role, ids, None, None, self.cache, own, keep)

    def _fused(self, found: Mapping[str, Tensor]) -> Float[Tensor, "s v"]:
        by_role = {role: found[self.cache.leader[role]] for role in self.target.roles}
        log_probs, weights, _ = fuse(self.target, by_role)
        self.cache.note(list(weights), torch.stack(list(weights.values()), -1))
        return self._warped(log_probs[0])

    def _warped(self, log_probs: Float[Tensor, "*s v"]) -> Float[Tensor, "*s v"]:
        """Return probabilities at the temperature, of the smallest set with mass top_p."""
        warm = (log_probs / self.temperature).log_softmax(-1)
        if self.top_p < 1:
            warm = warm.masked_fill(~nucleus(warm, self.top_p), -torch.inf).log_softmax(-1)
        return warm.exp()


def stands(token: int, p: Float[Tensor, " v"], q: Float[Tensor, " v"], chance: Chance) -> bool:
    """Return whether a token drafted from q is taken for one of p."""
    if isinstance(chance, Greedy):
        return token == int(p.argmax())
    return chance.accepts(min(1.0, float(p[token] / q[token])))


def residual(p: Float[Tensor, " v"], q: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """Return the distribution to draw from where a draft of q was refused: max(0, p - q) / Z."""
    left = (p - q).clamp(min=0)
    total = left.sum()
    return left / total if bool(total > 0) else p  # equal up to rounding

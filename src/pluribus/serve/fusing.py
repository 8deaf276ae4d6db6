"""Fused models in the batch: a cache for each member, and prompts of their own if there are any.

Row i has its own length in every member; a token that is written is one column in all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pluribus.core.shapes import Float, Int
from pluribus.decode._members import placed, run
from pluribus.decode._step import _known, fuse
from pluribus.serve import cache as kv


class Caches:
    """The members' caches of some rows, by the role that runs."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.members = dict(members)
        self.longer: dict[str, list[int]] = {}  # own prompts: tokens more than the common one
        self.last: dict[str, Float[Tensor, "1 1 v"]] = {}  # while a prompt is read


class FusedRunner:
    """How the batch calls a `Fused`; see `runner.Runner`."""

    routed = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.leader = _leaders(model)
        self.running = tuple(dict.fromkeys(self.leader.values()))

    @property
    def device(self) -> torch.device:
        """Where ids go first."""
        return self.model.device

    @property
    def fits(self) -> bool:
        """Whether all members can be told where their tokens stand."""
        wanted = {"position_ids", "attention_mask"}
        return all(wanted <= self.model.members_by_role[role].takes for role in self.running)

    def route(self, ids: Sequence[int], part: str | None = None) -> None:
        """Return None: nothing is routed."""

    def empty(self) -> Caches:
        """Return caches for a prompt."""
        return Caches({role: kv.empty() for role in self.running})

    def join(self, caches: Sequence[Caches]) -> Caches:
        """Return caches of the rows of several."""
        made = Caches({r: kv.join([one.members[r] for one in caches]) for r in self.running})
        for role in caches[0].longer:
            made.longer[role] = [more for one in caches for more in one.longer[role]]
        return made

    def keep(self, cache: Caches, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep some rows of those with these lengths."""
        for role, one in cache.members.items():
            more = cache.longer.get(role, [0] * len(lengths))
            own = [length + extra for length, extra in zip(lengths, more, strict=True)]
            kv.keep(one, rows, max(own) - max(own[i] for i in rows))
            if role in cache.longer:
                cache.longer[role] = [more[i] for i in rows]

    def size(self, ids: Sequence[int], inputs: Mapping[str, Any]) -> int:
        """Return how many tokens are to be read, in the longest member."""
        own = inputs.get("member_inputs", {}).values()
        return max([len(ids)] + [int(one["input_ids"].shape[1]) for one in own])

    def read(
        self,
        ids: Sequence[int],
        inputs: Mapping[str, Any],
        begin: int,
        end: int,
        cache: Caches,
        routes: Float[Tensor, "b t"] | None = None,
        every: bool = False,
    ) -> Float[Tensor, "s v"]:
        """Read a piece of a prompt in every member that is not done yet; see `Runner.read`."""
        own = inputs.get("member_inputs", {})
        logits: dict[str, Tensor] = dict(cache.last)
        for role in self.running:
            whole = own[role]["input_ids"][0].tolist() if role in own else list(ids)
            piece = whole[begin:end]
            cache.longer |= {role: [len(whole) - len(ids)]} if role in own else {}
            if not piece:
                continue
            given = torch.tensor([piece], device=self.device)
            seen = torch.ones(1, begin + len(piece), dtype=torch.long, device=self.device)
            logits[role] = self._member(role, given, seen, cache, every and not own)
        cache.last = {role: one[:, -1:] for role, one in logits.items()}
        if own:
            logits = cache.last
        if end < self.size(ids, inputs) and not every:
            return next(iter(logits.values()))[0, -1:]  # nothing is chosen by it yet
        found = self._fused(logits)[0]
        return found if every else found[-1:]

    def __call__(
        self,
        ids: Int[Tensor, "b s"],
        seen: Int[Tensor, "b a"],
        cache: Caches,
        routes: Float[Tensor, "b t"] | None = None,
        every: bool = False,
    ) -> Float[Tensor, "b s v"]:
        """Return the fused log-probabilities of the last position, or of all; add to the caches."""
        logits = {}
        for role in self.running:
            mask = seen
            if role in cache.longer:
                lengths = seen.sum(1) + torch.tensor(cache.longer[role], device=seen.device)
                width = int(lengths.max())
                mask = torch.arange(width, device=seen.device) >= width - lengths[:, None]
                mask = mask.long()
            logits[role] = self._member(role, ids, mask, cache, every)
        return self._fused(logits)

    def _member(
        self, role: str, ids: Tensor, seen: Tensor, cache: Caches, every: bool
    ) -> Float[Tensor, "b s v"]:
        member = self.model.members_by_role[role]
        if member.runs.training:
            member.runs.eval()
        known = _known(self.model, ids, None)
        places = placed(seen, ids.shape[1])
        keep = 0 if every else 1
        passed = run(member, known, seen, places, cache.members[role], True, keep)
        return passed.logits[..., : self.model.config.vocab_size]

    def _fused(self, logits: Mapping[str, Tensor]) -> Float[Tensor, "b s v"]:
        return fuse(self.model, {role: logits[self.leader[role]] for role in self.model.roles})[0]


def _leaders(model: Any) -> dict[str, str]:
    """Return for each role the first one that runs the same module on the same prompt."""
    found: dict[str, str] = {}
    for role in model.roles:
        key = (model.members_by_role[role].key, model.prompts.get(role))
        same = (
            other
            for other in found.values()
            if (model.members_by_role[other].key, model.prompts.get(other)) == key
        )
        found[role] = next(same, role)
    return found

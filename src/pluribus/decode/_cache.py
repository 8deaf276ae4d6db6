"""One cache for all members: each has its own inside, and its own prompt's mask.

`generate` of transformers takes it as any other: it tells its length in tokens of the common
prompt, and its rows are reordered, repeated, chosen and cut for all members at once. Fusion weights
of each position are kept along with the rows that they belong to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.optional import optional
from pluribus.core.shapes import Float, Int

hf = optional("transformers", "hf", "fusing language models")


class FusedCache(hf.Cache):
    """Caches of a `Fused`'s members, by the role that leads those who share it."""

    def __init__(self) -> None:
        self.members: dict[str, Any] = {}  # by leading role
        self.leader: dict[str, str] = {}  # role -> who runs for it
        self.masks: dict[str, Int[Tensor, "b p"]] = {}  # of own prompts, by leading role
        self.prompt = 0  # length of the common prompt, where some member has its own
        self.length = 0  # common tokens that were read
        self.names: tuple[str, ...] = ()  # what has weights
        self.weights: list[Float[Tensor, "b s w"]] = []  # of the rows as they are now
        self.steps: list[Float[Tensor, "b s w"]] = []  # of the rows as they were then
        self.records = False  # whether members can take back what they read
        self.offloading = False
        self.layer_class_to_replicate = None

    @property
    def layers(self) -> list[Any]:
        """All members' layers."""
        return [layer for one in self.members.values() for layer in getattr(one, "layers", ())]

    def start(self, leader: dict[str, str], masks: dict[str, Tensor], prompt: int) -> None:
        """Note who runs for whom, before the first tokens are read."""
        self.leader, self.masks, self.prompt = dict(leader), dict(masks), prompt

    def put(self, role: str, cache: Any) -> None:
        """Keep a member's cache. Raises InputError if it gave none."""
        if cache is None:
            raise InputError(
                f"the model in the role {role!r} keeps no cache; generate with use_cache=False"
            )
        fresh = role not in self.members
        self.members[role] = cache
        if fresh and self.records and hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()

    def note(self, names: Sequence[str], weights: Float[Tensor, "b s w"]) -> None:
        """Keep the weights of some positions."""
        self.names = tuple(names)
        self.weights.append(weights)
        self.steps.append(weights)

    def recorded(self) -> dict[str, Float[Tensor, "b s"]]:
        """Return the weights of each kept position, by role, for the rows as they are now."""
        if not self.weights:
            return {}
        table = torch.cat(self.weights, 1)
        return {name: table[..., i] for i, name in enumerate(self.names)}

    def by_token(self, beams: Int[Tensor, "b n"] | None) -> dict[str, Float[Tensor, "b n"]]:
        """Return the weights of each returned token, by role; NaN after a beam's end.

        `beams` says for each of them the row that it was chosen from at its step.
        """
        if beams is None:
            return self.recorded()
        found = {}
        for i, name in enumerate(self.names):
            steps = torch.cat([step[..., i] for step in self.steps], 1)  # (rows, n)
            places = beams[:, : steps.shape[1]].long().to(steps.device)
            own = steps[:, : places.shape[1]].gather(0, places.clamp(min=0))
            found[name] = own.masked_fill(places < 0, torch.nan)
        return found

    # -- what transformers asks --------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens of the common sequence were read."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: members' caches grow."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1, by the name that earlier releases ask for."""
        return -1

    @property
    def is_linear(self) -> list[bool]:
        """Say that there is a length, also while there is no layer."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        """Return False: several models run in turn."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether all members can forget their last tokens."""
        return all(_croppable(one) for one in self.members.values())

    def activate_past_recording(self) -> None:
        """Ask members to keep what they need to forget their last tokens."""
        self.records = True
        for one in self.members.values():
            if hasattr(one, "activate_past_recording"):
                one.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -3 removes three, as in transformers.

        Raises InputError if a member's cache cannot.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.length - tokens_to_remove
        for role, one in self.members.items():
            self.crop_member(role, one, count)
        self.length -= count
        self.weights = _cut(self.weights, count)
        self.steps = _cut(self.steps, count)

    def crop_member(self, role: str, cache: Any, count: int) -> None:
        """Let one member forget its last tokens; `crop(0)` lets it tidy up."""
        if count and not _croppable(cache):
            raise InputError(
                f"the cache of {role!r} ({type(cache).__name__}) cannot forget tokens, which "
                "drafting needs; decode it plainly"
            )
        cache.crop(-count)

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        """Put the rows of beams in order."""
        self._each("reorder_cache", beam_idx)
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each("batch_repeat_interleave", repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each("batch_select_indices", indices)
        self._rows(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forget everything."""
        self.members, self.leader, self.masks = {}, {}, {}
        self.prompt = self.length = 0
        self.weights, self.steps = [], []

    def _each(self, method: str, *given: Any) -> None:
        for one in self.members.values():
            getattr(one, method)(*given)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.masks = {role: change(mask) for role, mask in self.masks.items()}
        self.weights = [change(kept) for kept in self.weights]


def _croppable(cache: Any) -> bool:
    if not hasattr(cache, "crop"):
        return False
    own = getattr(cache, "is_croppable", None)  # releases before it: full attention can
    return not any(getattr(cache, "is_sliding", ())) if own is None else bool(own)


def _cut(kept: list[Tensor], count: int) -> list[Tensor]:
    kept = list(kept)
    while count > 0 and kept:
        last = kept.pop()
        if last.shape[1] > count:
            kept.append(last[:, :-count])
        count -= last.shape[1]
    return kept

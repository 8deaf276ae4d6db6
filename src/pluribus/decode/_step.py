"""One step of a `Fused`: each member at its own prefix, and their logits combined."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float, Int
from pluribus.decode._cache import FusedCache
from pluribus.decode._members import placed, run
from pluribus.decode._prompts import Own
from pluribus.decode.fusers import Fusion

if TYPE_CHECKING:
    from pluribus.decode.fused import Fused

CHUNK = {"cpu": 1 << 20}  # logits fused at a time: a few rows, so that threads can share them
LARGE_CHUNK = 1 << 22  # on other devices


def step(
    fused: "Fused",
    role: str,
    ids: Int[Tensor, "b s"],
    mask: Int[Tensor, "b a"] | None,
    places: Int[Tensor, "_ s"] | None,
    cache: FusedCache | None,
    own: Mapping[str, Own],
    keep: int | Tensor,
) -> Float[Tensor, "b k v"]:
    """Run one leading role's model and return its logits over the common vocabulary.

    They are of the k positions that are kept: all of the prompt's for 0, the last `keep` else.
    """
    b, s = ids.shape
    if role in own:
        ids, mask = own[role]
        places = placed(mask, ids.shape[1])
    elif cache is not None and role in cache.masks:
        before = cache.masks[role]
        past = _read(cache, role) - before.shape[1]
        tail = ids.new_ones(b, past + s) if mask is None else mask[:, cache.prompt :]
        mask = torch.cat((before.to(tail), tail[:, : past + s]), 1)
        places = placed(mask, s)
    elif places is None and mask is not None:
        places = placed(mask, s)
    kept_cache = None if cache is None else cache.members.get(role)
    member = fused.members_by_role[role]
    if member.runs.training:
        member.runs.eval()
    ids = _known(fused, ids, mask)
    passed = run(member, ids, mask, places, kept_cache, cache is not None, keep)
    if cache is not None:
        cache.put(role, passed.cache)
    return passed.logits[..., : fused.config.vocab_size]


def _read(cache: FusedCache, role: str) -> int:
    """Return how many tokens a member's own cache holds."""
    try:
        return cache.members[role].get_seq_length()
    except ValueError:  # a recurrent member's cache has no length, and cannot run ahead
        return cache.masks[role].shape[1] + cache.length - cache.prompt


def _known(fused: "Fused", ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return ids that all members know: padding may be beyond them, nothing else."""
    if fused.config.align != "prefix":
        return ids
    beyond = ids >= fused.config.vocab_size
    pad = fused.generation_config.pad_token_id
    real = beyond if mask is None else beyond & mask[:, -ids.shape[1] :].bool().to(ids.device)
    if pad is not None:
        real = real & (ids != pad)
    if bool(real.any()):
        raise InputError(
            f"token id {int(ids[real][0])} is not known to all members, who share "
            f"{fused.config.vocab_size} ids; leave such tokens out of the prompt"
        )
    return ids.masked_fill(beyond, 0)


def fuse(
    fused: "Fused", logits: Mapping[str, Float[Tensor, "b s v"]]
) -> tuple[Float[Tensor, "b s v"], dict[str, Float[Tensor, "b s"]], dict[str, Any]]:
    """Return fused log-probabilities, weights by role, and what the fuser tells, of positions.

    A few rows at a time, so that memory does not grow with the text.
    """
    first = next(iter(logits.values()))
    b, s, v = first.shape
    device = first.device
    flat = {role: x.reshape(b * s, v) for role, x in logits.items()}
    size = max(1, CHUNK.get(device.type, LARGE_CHUNK) // v)
    parts: list[Fusion] = []
    for low in range(0, b * s, size):
        some = {r: x[low : low + size].to(device) for r, x in flat.items()}
        parts.append(fused.fuser(some))
    whole = torch.cat([part.log_probs for part in parts]).float().view(b, s, v)
    names = list(parts[0].weights)
    weights = {n: torch.cat([p.weights[n] for p in parts]).float().view(b, s) for n in names}
    info: dict[str, Any] = {}
    for name, value in parts[0].info.items():
        told = [part.info[name] for part in parts]
        info[name] = torch.cat(told).view(b, s) if isinstance(value, Tensor) else value
    fused.watch.look(info)
    return whole, weights, info

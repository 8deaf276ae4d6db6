"""Teacher forcing: what members and their fusion say of a continuation, and texts as inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError, MissingError
from pluribus.core.shapes import Float, Int
from pluribus.decode._cache import FusedCache
from pluribus.decode._members import leaders
from pluribus.decode._prompts import Own, encoded, own_prompts
from pluribus.decode._step import fuse, step

if TYPE_CHECKING:
    from pluribus.decode.fused import Fused


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a continuation's tokens, in nats."""

    tokens: Int[Tensor, " n"]
    log_probs: Float[Tensor, " n"]  # of the fusion
    members: Mapping[str, Float[Tensor, " n"]]  # of each role alone
    weights: Mapping[str, Float[Tensor, " n"]]  # with which each token was predicted

    @property
    def total(self) -> float:
        """The continuation's log-probability."""
        return float(self.log_probs.sum())


@torch.no_grad()
def score(
    fused: "Fused",
    prompt: Any,
    continuation: Any,
    *,
    member_inputs: Mapping[str, Any] | None = None,
) -> Score:
    """Score a continuation after a prompt: texts, or ids (a list, or a tensor of one row).

    Texts are tokenised apart, so that roles with their own prompts read the same continuation; they
    get them by the fused model's templates, unless `member_inputs` are given. Raises InputError for
    a prompt or continuation without tokens, MissingError for texts without a tokenizer.
    """
    if isinstance(prompt, str):
        made = encode(fused, [prompt])
        ids = made["input_ids"]
        member_inputs = made.get("member_inputs") if member_inputs is None else member_inputs
    else:
        ids = _row(fused, prompt, "prompt")
    ahead = _row(fused, continuation, "continuation")
    if not ids.shape[1] or not ahead.shape[1]:
        raise InputError("the prompt and the continuation need a token each")
    own = own_prompts(member_inputs, fused.roles, 1)
    cache = FusedCache() if own else None
    logits = {}
    if cache is None:
        whole = torch.cat((ids, ahead), 1)
        fused.fits(whole, None, None, {})
        leader = leaders(fused.members_by_role, {}, fused.roles)
        for role in dict.fromkeys(leader.values()):
            given = step(fused, role, whole, None, None, None, {}, ahead.shape[1] + 1)
            logits[role] = given[:, :-1]
    else:
        fused.fits(ids, None, None, own, ahead.shape[1])
        leader = leaders(fused.members_by_role, own, fused.roles)
        masks = {role: own[role].mask for role in dict.fromkeys(leader.values()) if role in own}
        cache.start(leader, masks, ids.shape[1])
        for role in dict.fromkeys(leader.values()):
            first = step(fused, role, ids, None, None, cache, own, 1)
            cache.length = ids.shape[1]
            rest = step(fused, role, ahead, None, None, cache, {}, 0)
            logits[role] = torch.cat((first, rest[:, :-1]), 1)
    by_role = {role: logits[leader[role]] for role in fused.roles}
    whole_logits, weights, _ = fuse(fused, by_role)

    def told(values: Tensor) -> Tensor:
        return values[0].gather(1, ahead[0, :, None].to(values.device))[:, 0].cpu()

    return Score(
        ahead[0].cpu(),
        told(whole_logits),
        {role: told(x.float().log_softmax(-1)) for role, x in by_role.items()},
        {role: w[0].cpu() for role, w in weights.items()},
    )


def _row(fused: "Fused", given: Any, what: str) -> Int[Tensor, "1 n"]:
    if isinstance(given, str):
        ids = tokenizer_of(fused)(given, add_special_tokens=what == "prompt")["input_ids"]
        return torch.tensor([ids], dtype=torch.long, device=fused.device).view(1, -1)
    ids = torch.as_tensor(given, dtype=torch.long, device=fused.device)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != 1:
        raise InputError(f"the {what} is {list(ids.shape)}; expected one row of ids, or a text")
    return ids


def encode(fused: "Fused", prompts: Sequence[str]) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `member_inputs` of texts, padded on the left.

    Roles with a template (`fused.prompts`) get their own prompt, made with their own tokenizer;
    the others read the texts as they are. Raises MissingError without a tokenizer.
    """
    plain = encoded(tokenizer_of(fused), fused.roles[0], "{prompt}", prompts)
    made: dict[str, Any] = {
        "input_ids": plain.ids.to(fused.device),
        "attention_mask": plain.mask.to(fused.device),
    }
    own: dict[str, Own] = {
        role: encoded(fused.tokenizers.get(role, tokenizer_of(fused)), role, template, prompts)
        for role, template in fused.prompts.items()
    }
    if own:
        made["member_inputs"] = {
            role: {"input_ids": one.ids, "attention_mask": one.mask} for role, one in own.items()
        }
    return made


def tokenizer_of(fused: "Fused") -> Any:
    """Return the tokenizer of the common ids. Raises MissingError if none was given."""
    if not fused.tokenizers:
        raise MissingError("to read texts, give tokenizers={role: tokenizer} to Fused")
    known = [fused.tokenizers[role] for role in fused.roles if role in fused.tokenizers]
    return min(known, key=lambda one: len(one))

"""Prompts: one for all members, or its own for some; the continuation is common to all."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pluribus.core.errors import InputError, MissingError, nearest
from pluribus.core.shapes import Int

CHAT = "chat"  # in place of a template: the tokenizer's own chat template
SLOT = "{prompt}"


class Own(NamedTuple):
    """A role's own prompt, padded on the left."""

    ids: Int[Tensor, "b p"]
    mask: Int[Tensor, "b p"]


def own_prompts(given: Mapping[str, Any] | None, roles: Sequence[str], rows: int) -> dict[str, Own]:
    """Return own prompts by role, of `{role: {"input_ids": ..., "attention_mask": ...}}`.

    Raises InputError for an unknown role, another number of rows, an empty prompt, or padding on
    the right.
    """
    found = {}
    for role, one in (given or {}).items():
        if role not in roles:
            raise InputError(
                f"member_inputs has a prompt for {role!r}; roles are {', '.join(roles)}."
                f"{nearest(role, roles)}"
            )
        if isinstance(one, Own):
            found[role] = one
            continue
        ids = one.get("input_ids") if isinstance(one, Mapping) else one
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise InputError(
                f"member_inputs of {role!r}: expected {{'input_ids': (b, p) tensor of ids, "
                "'attention_mask': the same shape}"
            )
        mask = one.get("attention_mask") if isinstance(one, Mapping) else None
        mask = torch.ones_like(ids) if mask is None else mask
        if len(ids) != rows:
            raise InputError(f"member_inputs of {role!r} has {len(ids)} rows; the batch has {rows}")
        if ids.shape[1] == 0 or not bool(mask.any(1).all()):
            raise InputError(f"the prompt of {role!r} has no tokens in some row; give it one")
        if mask.shape != ids.shape or not bool(mask[:, -1].all()):
            raise InputError(f"the prompt of {role!r} must be padded on the left, with a mask")
        found[role] = Own(ids, mask)
    return found


def repeated(prompts: Mapping[str, Own], times: int) -> dict[str, Own]:
    """Return prompts with every row `times` times, for beams and samples."""
    return {
        role: Own(own.ids.repeat_interleave(times, 0), own.mask.repeat_interleave(times, 0))
        for role, own in prompts.items()
    }


def padded(rows: Sequence[Sequence[int]], fill: int) -> Own:
    """Return rows of ids as one tensor, padded on the left, with its mask."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            ids[i, width - len(row) :] = torch.tensor(list(row), dtype=torch.long)
            mask[i, width - len(row) :] = 1
    return Own(ids, mask)


def encoded(tokenizer: Any, role: str, template: str, prompts: Sequence[str]) -> Own:
    """Return prompts in a role's template: a text with {prompt} in it, or "chat".

    Raises InputError for a template without a place for the prompt, or a prompt that has no tokens;
    MissingError for "chat" with a tokenizer that has no chat template.
    """
    rows = [template_ids(tokenizer, role, template, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        if not ids:
            raise InputError(f"the tokenizer of {role!r} makes no tokens of {prompt[:60]!r}")
    pad = getattr(tokenizer, "pad_token_id", None)
    return padded(rows, 0 if pad is None else pad)


def template_ids(tokenizer: Any, role: str, template: str, prompt: str) -> list[int]:
    """Return the ids of one prompt in a template."""
    if template == CHAT:
        if not getattr(tokenizer, "chat_template", None):
            raise MissingError(f"the tokenizer of {role!r} has no chat template; write one out")
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    check_template(role, template)
    return list(tokenizer(template.replace(SLOT, prompt))["input_ids"])


def check_templates(templates: Mapping[str, str], roles: Sequence[str]) -> None:
    """Raise InputError for a template of no role, or without a place for the prompt."""
    for role, template in templates.items():
        if role not in roles:
            raise InputError(
                f"prompts has a template for {role!r}; roles are {', '.join(roles)}."
                f"{nearest(role, roles)}"
            )
        check_template(role, template)


def check_template(role: str, template: str) -> None:
    """Raise InputError for a template without a place for the prompt."""
    if template != CHAT and SLOT not in template:
        raise InputError(
            f"the prompt template of {role!r} is {template!r}; it needs {SLOT} where the prompt "
            f"goes, or is {CHAT!r}"
        )

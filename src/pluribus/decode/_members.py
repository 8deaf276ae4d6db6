"""Members of a `Fused`: which modules they are, what they take, and one step of one of them."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError
from pluribus.core.renamed import cache_name
from pluribus.core.shapes import Float, Int


@dataclass(frozen=True)
class Unadapted:
    """A model with a PEFT adapter in a role without it: the adapter is off while that role runs.

    `{"tuned": adapted, "base": Unadapted(adapted)}` keeps one module in memory and runs it twice.
    """

    model: Any


class Member(NamedTuple):
    """One role's module. Roles with the same module and adapter are the same member."""

    module: nn.Module  # what is stored and moved
    runs: nn.Module  # what is called: the model below a PEFT wrapper
    adapted: bool | None  # None: there is no adapter
    takes: frozenset[str]  # arguments of `runs`
    cache: str  # what it calls its key-value cache: transformers renamed it

    @property
    def key(self) -> tuple[int, bool | None]:
        """What two roles have in common if one forward pass serves both."""
        return id(self.module), self.adapted

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.runs.parameters()).device

    def toggled(self) -> AbstractContextManager[Any]:
        """Turn the adapter off for as long as this member runs, if that is its role."""
        if self.adapted is not False:
            return nullcontext()
        return self.module.disable_adapter()  # type: ignore[operator]


class Passed(NamedTuple):
    """What a member gives for its inputs."""

    logits: Float[Tensor, "b s v"]
    cache: Any


def member_of(role: str, given: Any) -> Member:
    """Return a member. Raises InputError for what is no causal language model."""
    plain = isinstance(given, Unadapted)
    module = given.model if plain else given
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise InputError(
            f"the model in the role {role!r} is a {type(module).__name__}; expected a transformers "
            "model"
        )
    config: Any = module.config
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{role!r} ({type(module).__name__}) is an encoder-decoder model; only causal language "
            "models can be fused"
        )
    wrapped = hasattr(module, "get_base_model") and hasattr(module, "disable_adapter")
    if wrapped and getattr(module.active_peft_config, "is_prompt_learning", False):
        raise InputError(
            f"the adapter in the role {role!r} learns prompts; only LoRA-like ones fit"
        )
    runs: Any = module.get_base_model() if wrapped else module  # type: ignore[operator]
    if not getattr(type(runs), "can_generate", lambda: False)():
        raise InputError(
            f"{role!r} ({type(runs).__name__}) has no language-model head; open it with "
            "AutoModelForCausalLM"
        )
    if plain and not wrapped:
        raise InputError(f"{role!r}: Unadapted takes a PEFT model, not {type(module).__name__}")
    takes = frozenset(inspect.signature(runs.forward).parameters)
    return Member(module, runs, (not plain) if wrapped else None, takes, cache_name(takes))


def scored(member: Member) -> int:
    """Return how many ids a member scores."""
    config: Any = member.runs.config
    return config.get_text_config().vocab_size


def room(member: Member) -> int | None:
    """Return how many tokens a member takes; None: there is no limit."""
    config: Any = member.runs.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def run(
    member: Member,
    ids: Int[Tensor, "b s"],
    mask: Int[Tensor, "b a"] | None,
    places: Int[Tensor, "b s"] | None,
    cache: Any,
    use_cache: bool,
    keep: int | Tensor,
) -> Passed:
    """Run one member on its device; logits are of the last `keep` positions (0: of all)."""
    device = member.device
    given: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": use_cache}
    if mask is not None:
        given["attention_mask"] = mask.to(device)
    if places is not None and "position_ids" in member.takes:
        given["position_ids"] = places.to(device)
    if cache is not None:
        given[member.cache] = cache
    trims = "logits_to_keep" in member.takes
    if trims:
        given["logits_to_keep"] = keep
    with member.toggled():
        out = member.runs(**given)
    logits = out.logits
    if not trims:
        logits = kept(logits, keep)
    return Passed(logits, getattr(out, member.cache, None) if use_cache else None)


def kept(values: Tensor, keep: int | Tensor) -> Tensor:
    """Return the last `keep` of the second axis, those that a tensor names, or all for 0."""
    if isinstance(keep, Tensor):
        return values[:, keep]
    return values if keep == 0 else values[:, -keep:]


def placed(mask: Int[Tensor, "b a"], length: int) -> Int[Tensor, "b s"]:
    """Return the positions of the last `length` tokens: how many real ones precede each."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def leaders(
    members: Mapping[str, Member], prompts: Mapping[str, Any], roles: Sequence[str]
) -> dict[str, str]:
    """Return for each role the first one that runs the same module on the same prompt."""
    found: dict[str, str] = {}
    for role in roles:
        for other in found.values():
            same = members[other].key == members[role].key
            if same and _alike(prompts.get(other), prompts.get(role)):
                found[role] = other
                break
        else:
            found[role] = role
    return found


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))

"""Emulated fine-tuning for use: up-scaling, a dial between tunings, and the reward they imply.

Mitchell et al., ICLR 2024, https://arxiv.org/abs/2310.12962; the arithmetic is in `fusers.eft`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pluribus.core.errors import InputError
from pluribus.decode.fusers.eft import EFT

if TYPE_CHECKING:
    from pluribus.decode.fused import Fused


def upscale(
    large_base: Any,
    small_tuned: Any,
    small_base: Any,
    *,
    weight: float = 1.0,
    top_p_filter: float | None = None,
    prompts: Mapping[str, str] | None = None,
    **settings: Any,
) -> "Fused":
    """Return a large base model that writes as if it had been tuned as the small one was.

    Roles are `ref` (large base), `tuned` and `base`; `prompts` are templates by role, `settings`
    those of `Fused`. Giving the larger model as the tuned one scales down instead.
    """
    from pluribus.decode.fused import Fused

    models = {"ref": large_base, "tuned": small_tuned, "base": small_base}
    fuser = EFT(weights={"tuned": weight}, top_p_filter=top_p_filter)
    fused = Fused(models, fuser, **settings)
    fused.set_prompts(prompts or {})
    return fused


def dial(
    base: Any,
    tuned: Mapping[str, Any],
    ref: Any = None,
    weights: Mapping[str, float] | None = None,
    **settings: Any,
) -> "Fused":
    """Return a model between several tunings of one base, to be set with `set_weights`.

    `ref` is the base at another scale; without it the scale stays the base's. Weights are equal at
    first, and 1 in all. Raises InputError if a tuning is named as the base is.
    """
    from pluribus.decode.fused import Fused

    if taken := [name for name in tuned if name in ("ref", "base")]:
        raise InputError(f"a tuned model cannot be called {taken[0]!r}, which is a role of its own")
    shares = dict(weights) if weights is not None else dict.fromkeys(tuned, 1 / max(len(tuned), 1))
    models = {**({} if ref is None else {"ref": ref}), "base": base, **tuned}
    fuser = EFT(weights=shares, ref="base" if ref is None else "ref")
    return Fused(models, fuser, **settings)


def implicit_reward(
    fused: "Fused", prompt: Any, continuation: Any, *, tuned: str | None = None, **settings: Any
) -> float:
    """Return sum_t log tuned - log base of a continuation: the reward it was tuned for, over beta.

    A reward model for best-of-n that nobody had to train. `tuned` names the role if there are
    several. Raises InputError for a fuser that is no EFT.
    """
    fuser = fused.fuser
    if not isinstance(fuser, EFT):
        raise InputError(f"a {type(fuser).__name__} has no tuned model and base to compare")
    roles = fuser.tuned(fused.roles)
    if tuned is None and len(roles) > 1:
        raise InputError(f"there are {len(roles)} tuned models, {', '.join(roles)}; say tuned=...")
    role = roles[0] if tuned is None else tuned
    if role not in roles:
        raise InputError(f"tuned={role!r} is none of {', '.join(roles)}")
    told = fused.score(prompt, continuation, **settings)
    return float((told.members[role] - told.members[fuser.base]).sum())

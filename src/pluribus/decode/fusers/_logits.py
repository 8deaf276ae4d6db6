"""Arithmetic that fusers share: logits checked and normalised, and one set of logits shifted."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.shapes import Bool, Float

NOTHING = -torch.inf


def normalised(
    logits: Mapping[str, Float[Tensor, "b v"]],
) -> tuple[dict[str, Float[Tensor, "b v"]], Bool[Tensor, "b v"] | None]:
    """Return log-probabilities over the tokens that no member excludes, and which those are.

    None stands for all. An excluded token is -inf in all. Raises NonFiniteError for NaN and +inf,
    MismatchError for shapes that differ, InputError for a row without a token that is left.
    """
    known = {role: x.log_softmax(-1) for role, x in widened(logits).items()}
    lowest = torch.stack([x.amin(-1) for x in known.values()])  # NaN, +inf and -inf show in it
    if bool((lowest > NOTHING).all()):
        return known, None
    wide = checked(logits)
    kept = torch.stack([x != NOTHING for x in wide.values()]).all(0)
    if not bool(kept.any(-1).all()):
        raise InputError("every token is -inf in one model or another, so none can be chosen")
    return {r: x.masked_fill(~kept, NOTHING).log_softmax(-1) for r, x in wide.items()}, kept


def shifted(
    logits: Mapping[str, Float[Tensor, "b v"]], large: str, base: str, weights: Mapping[str, float]
) -> Float[Tensor, "b v"] | None:
    """Return large + sum_t w_t (expert_t - base), normalised, straight from the logits.

    What the members are normalised by cancels in it: one pass of exponentials instead of one a
    member more. None if a token is excluded or a logit is not finite: `normalised` tells which.
    """
    wide = widened(logits)
    moved = wide[large]
    for role, weight in weights.items():
        moved = moved.add(wide[role] - wide[base], alpha=weight)
    found = moved.log_softmax(-1)
    return found if bool((found.amin(-1) > NOTHING).all()) else None


def checked(logits: Mapping[str, Float[Tensor, "b v"]]) -> dict[str, Float[Tensor, "b v"]]:
    """Return logits in float32 or wider. Raises MismatchError, NonFiniteError (NaN, +inf)."""
    wide = widened(logits)
    highest = torch.stack([x.amax(-1) for x in wide.values()])  # NaN and +inf show in it
    if not bool((highest < torch.inf).all()):
        for role, x in wide.items():
            if bool((x.isnan() | (x == torch.inf)).any()):
                word = "NaN" if bool(x.isnan().any()) else "+inf"
                raise NonFiniteError(
                    f"the model in the role {role!r} gave {word} as a logit; try float32, or look "
                    "at its weights"
                )
    return wide


def widened(logits: Mapping[str, Float[Tensor, "b v"]]) -> dict[str, Float[Tensor, "b v"]]:
    """Return logits in float32 or wider. Raises MismatchError for shapes that differ."""
    if not logits:
        raise InputError("there are no logits to fuse")
    first_role, first = next(iter(logits.items()))
    wide = {}
    for role, x in logits.items():
        if x.shape != first.shape or x.ndim != 2:
            raise MismatchError(
                f"logits of {role!r} are {list(x.shape)}, those of {first_role!r} "
                f"{list(first.shape)}; all must be (rows, vocabulary)"
            )
        wide[role] = x if x.dtype == torch.float64 else x.float()
    return wide


def shift(
    expert: Float[Tensor, "b v"], base: Float[Tensor, "b v"], kept: Bool[Tensor, "b v"] | None
) -> Float[Tensor, "b v"]:
    """Return log expert - log base, and 0 where a token is excluded."""
    return expert - base if kept is None else (expert - base).masked_fill(~kept, 0.0)


def without(
    log_probs: Float[Tensor, "b v"], base: Float[Tensor, "b v"], ids: Sequence[int]
) -> Float[Tensor, "b v"]:
    """Return an expert's log-probabilities with the base's at some ids, normalised again.

    Raises InputError for an id that the vocabulary does not have.
    """
    if not ids:
        return log_probs
    if max(ids) >= log_probs.shape[-1] or min(ids) < 0:
        raise InputError(
            f"excluded id {max(ids) if min(ids) >= 0 else min(ids)} is not in the vocabulary of "
            f"{log_probs.shape[-1]} tokens"
        )
    places = torch.tensor(list(ids), device=log_probs.device)
    return log_probs.index_copy(-1, places, base[:, places]).log_softmax(-1)


def rows(value: float, like: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
    """Return one number for every row."""
    return like.new_full((len(like),), value)

"""Whether members speak of the same tokens: the whole map from tokens to ids is compared.

`same`: all maps are equal and all models score as many ids. `prefix`: one map begins all others,
which only append tokens (a padding token, say) or score more ids than there are tokens; what is
beyond the shortest is masked in all.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pluribus.core.errors import InputError, MismatchError

Align = Literal["same", "prefix"]
TRY_PREFIX = "if one only appends tokens to the other, say align='prefix'"


class Shared(NamedTuple):
    """What members have in common."""

    size: int  # ids that are scored
    checked: bool  # whether the token maps were there to compare


def aligned(sizes: Mapping[str, int], tokenizers: Mapping[str, Any] | None, align: str) -> Shared:
    """Return how many ids all members share, or raise MismatchError naming what differs.

    `sizes` are the models' logits by role. Without tokenizers only sizes can be compared.
    """
    if align not in ("same", "prefix"):
        raise InputError(f"align is {align!r}; expected 'same' or 'prefix'")
    first, size = next(iter(sizes.items()))
    if align == "same":
        for role, other in sizes.items():
            if other != size:
                raise MismatchError(
                    f"{role!r} scores {other} tokens, {first!r} {size}: their vocabularies differ; "
                    + TRY_PREFIX
                )
    if tokenizers is None:
        if align == "prefix":
            raise InputError(
                "align='prefix' compares the members' token maps: give tokenizers={role: tokenizer}"
            )
        return Shared(size, False)
    if lacking := [role for role in sizes if role not in tokenizers]:
        raise InputError(f"tokenizers are given, but none for {', '.join(map(repr, lacking))}")
    maps = {role: vocabulary(tokenizers[role]) for role in sizes}
    shortest = min(maps, key=lambda role: len(maps[role]))
    for role, own in maps.items():
        if own is not maps[shortest]:
            _compare(shortest, maps[shortest], role, own, align)
    tokens = max(maps[shortest].values()) + 1
    for role, scored in sizes.items():
        if scored < tokens:
            raise MismatchError(
                f"{role!r} scores {scored} ids, but its tokenizer has {tokens}; is it another "
                "model's?"
            )
    return Shared(size if align == "same" else min(tokens, *sizes.values()), True)


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """Return a tokenizer's whole map from tokens to ids, or a mapping as it is."""
    found = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"a {type(tokenizer).__name__} is no tokenizer: it has no vocabulary")
    return dict(found)


def _compare(
    first: str, shortest: Mapping[str, int], role: str, own: Mapping[str, int], align: str
) -> None:
    for token, number in sorted(shortest.items(), key=lambda item: item[1]):
        if own.get(token) != number:
            told = "does not have it" if token not in own else f"has it as {own[token]}"
            raise MismatchError(
                f"token {token!r} is id {number} of {first!r}, but {role!r} {told}: these models "
                "do not speak of the same tokens, so their logits cannot be combined"
            )
    added = {token: number for token, number in own.items() if token not in shortest}
    if added and align == "same":
        token = min(added, key=lambda one: added[one])
        raise MismatchError(
            f"{role!r} has {len(added)} tokens that {first!r} lacks, such as {token!r} (id "
            f"{added[token]}); {TRY_PREFIX}"
        )
    last = max(shortest.values())
    for token, number in added.items():
        if number <= last:
            raise MismatchError(
                f"token {token!r} of {role!r} (id {number}) is not appended to the tokens of "
                f"{first!r}, which end at {last}; 'prefix' needs the same beginning"
            )

"""What is refused before the work, and what is warned of: contexts, and experts of another base."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Int
from pluribus.decode._cache import FusedCache
from pluribus.decode._prompts import Own

FAR = 5.0  # nats: an expert this far from its base was hardly tuned from it
LOOKED = 16  # positions before that is said


def check_room(
    limit: int | None,
    role: str | None,
    length: int,
    mask: Int[Tensor, "b a"] | None,
    cache: FusedCache | None,
    own: Mapping[str, Own],
    more: int = 0,
) -> None:
    """Raise InputError if `length` further tokens, and `more` to come, are over the limit.

    The limit is that of the shortest member, `role`; padding does not count.
    """
    if limit is None:
        return
    past = 0 if cache is None else cache.length
    masks = {} if cache is None else cache.masks
    grown = [before.shape[1] + past + length - cache.prompt for before in masks.values() if cache]
    longest = max([past + length, *(one.ids.shape[1] for one in own.values()), *grown])
    if longest + more <= limit:
        return
    real = longest
    if not masks:
        rows = [past + length if mask is None else int(mask.sum(1).max())]
        real = max([*rows, *(int(one.mask.sum(1).max()) for one in own.values())])
    if real + more > limit:
        new = f" and {more} new ones" if more else ""
        raise InputError(
            f"{real} tokens of a prompt{new} are more than the {limit} that {role!r} takes "
            "(max_position_embeddings); give fewer"
        )


class Watch:
    """Warns once of an expert that is too far from the base to have been tuned from it."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def look(self, info: Mapping[str, Any]) -> None:
        """Take in what a fuser tells of some positions: KL(Q_t || Q) of expert t as "kl t"."""
        for name, value in info.items():
            if not name.startswith("kl "):
                continue
            seen = self.seen.setdefault(name, [])
            if len(seen) >= LOOKED:
                continue
            seen += value.detach().flatten()[: LOOKED - len(seen)].tolist()
            if len(seen) >= LOOKED and (mean := sum(seen) / len(seen)) > FAR:
                warnings.warn(
                    f"{name[3:]!r} is {mean:.1f} nats away from the base on average; was it tuned "
                    "from another one? Its shift then says little",
                    stacklevel=2,
                )

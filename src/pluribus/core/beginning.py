"""A beginning that rows of tokens share: read once, and its cache repeated for each of them."""

import copy
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from pluribus.core.optional import optional
from pluribus.core.renamed import cache_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pluribus.core.shapes import Int

LEAST = 16  # tokens that rows must share to read them apart


class Opening(NamedTuple):
    """What all rows begin with, and the cache of it; nothing and None where they share none."""

    tokens: list[int]
    cache: Any

    @classmethod
    def of(cls, model: Any, rows: Sequence[Sequence[int]], device: "torch.device") -> "Opening":
        """Read once what all rows begin with, such as worked examples."""
        import torch

        count = common(rows) if len(rows) > 1 else 0
        if count < LEAST:
            return cls([], None)
        cache = read(model, torch.tensor([rows[0][:count]], device=device))
        return cls([], None) if cache is None else cls(list(rows[0][:count]), cache)

    def before(
        self, rows: Sequence[Sequence[int]], device: "torch.device", whole: bool = False
    ) -> "tuple[Int[Tensor, 'b s'], Int[Tensor, 'b t'], Any]":
        """Return rows padded behind the opening, the mask of all, and the opening's cache for each.

        The ids are those behind the opening, or with `whole` all.
        """
        import torch

        count = len(self.tokens)
        ids, seen = padded([row[count:] for row in rows], left=True, device=device)
        if self.cache is None:
            return ids, seen, None
        first = torch.tensor([self.tokens], device=device).expand(len(rows), -1)
        seen = torch.cat((torch.ones_like(first), seen), 1)
        ids = torch.cat((first, ids), 1) if whole else ids
        return ids, seen, repeated(self.cache, len(rows))


def common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with; of each at least one is left."""
    least = min(map(len, rows)) - 1
    columns = zip(*(row[:least] for row in rows), strict=True)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def padded(
    rows: Sequence[Sequence[int]], *, left: bool, device: "torch.device"
) -> "tuple[Int[Tensor, 'b s'], Int[Tensor, 'b s']]":
    """Return rows of tokens as one tensor, 0 where there is none, and a mask of what is there."""
    import torch

    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        seen[i, span] = 1
    return ids.to(device), seen.to(device)


def read(model: Any, ids: "Tensor", seen: "Tensor | None" = None, cache: Any = None) -> Any:
    """Return a model's cache of rows (b, s), or None where it cannot stand for others' too.

    `seen` (b, past + s) masks padding on the left, `cache` holds what was read before. A cache can
    be repeated that keeps every token it has read: padding may follow such a beginning. Composites
    route a row as a whole, and windows count padding.
    """
    hf = optional("transformers", "hf", "running language models")
    if not isinstance(model, hf.PreTrainedModel):
        return None
    import torch

    takes = inspect.signature(model.forward).parameters
    seen = torch.ones_like(ids) if seen is None else seen
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": seen}
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = 1
    if "position_ids" in takes:
        given["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if cache is not None:
        given[cache_name(takes)] = cache
    with torch.inference_mode():
        passed = model(**given, use_cache=True)
    cache = getattr(passed, cache_name(takes), None)
    layers = getattr(cache, "layers", ())
    plain = layers and all(type(layer) is hf.cache_utils.DynamicLayer for layer in layers)
    return cache if plain and hasattr(cache, "batch_repeat_interleave") else None


def repeated(cache: Any, rows: int) -> Any:
    """Return a copy of the cache of one row with so many; the given one stays as it is."""
    made = copy.deepcopy(cache)
    if rows > 1:
        made.batch_repeat_interleave(rows)
    return made

"""A beginning that rows of tokens share: read once, and its cache repeated for each of them."""

import copy
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from pluribus.core.optional import optional
from pluribus.core.renamed import cache_name

if TYPE_CHECKING:
    from torch import Tensor


def common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with; of each at least one is left."""
    least = min(map(len, rows)) - 1
    columns = zip(*(row[:least] for row in rows), strict=True)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def read(model: Any, ids: "Tensor") -> Any:
    """Return a model's cache of one row (1, s), or None where it cannot stand for others' too.

    A cache can be repeated that keeps every token it has read: padding may follow such a beginning.
    Composites route a row as a whole, and windows count padding.
    """
    hf = optional("transformers", "hf", "running language models")
    if not isinstance(model, hf.PreTrainedModel):
        return None
    import torch

    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1
    with torch.inference_mode():
        passed = model(**given, use_cache=True)
    cache = getattr(passed, cache_name(model.forward), None)
    layers = getattr(cache, "layers", ())
    plain = layers and all(type(layer) is hf.cache_utils.DynamicLayer for layer in layers)
    return cache if plain and hasattr(cache, "batch_repeat_interleave") else None


def repeated(cache: Any, rows: int) -> Any:
    """Return a copy of the cache of one row with so many; the given one stays as it is."""
    made = copy.deepcopy(cache)
    if rows > 1:
        made.batch_repeat_interleave(rows)
    return made

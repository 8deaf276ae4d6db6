"""The key-value cache of rows that come and go, padded on the left.

Row i of a batch has its own length; the last token of every row stands at the right edge, so a new
token is one column. Buffers grow by doubling and are written in place; a row that joins or leaves
moves the others at most once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pluribus.core.optional import optional
from pluribus.core.shapes import Float

hf = optional("transformers", "hf", "serving a language model")
SPARE = 64  # columns at least that are made beyond those needed


class Layer(hf.DynamicLayer if hasattr(hf, "DynamicLayer") else hf.cache_utils.DynamicLayer):
    """Keys and values (b, heads, s, d) of one layer, in buffers with room to grow."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None
        self.first = self.last = 0  # columns of the buffers that are in use

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns and return all."""
        new = key_states.shape[-2]
        if self.room is None:
            self.device, self.dtype = key_states.device, key_states.dtype
            self._make(key_states, value_states, len(key_states), 0, new)
        elif self.last + new > self.room[0].shape[-2]:
            self._make(*self.room, len(self.room[0]), self.last - self.first, new)
        assert self.room is not None
        for room, added in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.last : self.last + new] = added
        self.last += new
        self._look()
        return self.keys, self.values  # type: ignore[return-value]

    def _make(self, keys: Tensor, values: Tensor, rows: int, used: int, more: int) -> None:
        """Make buffers for `used` columns, copied, and at least `more` beside them."""
        size = used + more + max(SPARE, used // 2)
        made = []
        for one in (keys, values):
            fresh = one.new_zeros(rows, one.shape[1], size, one.shape[3])
            if used:
                fresh[:, :, :used] = one[:, :, self.first : self.last]
            made.append(fresh)
        self.room = (made[0], made[1])
        self.first, self.last = 0, used

    def _look(self) -> None:
        assert self.room is not None
        keys, values = self.room
        self.keys, self.values = (x[:, :, self.first : self.last] for x in (keys, values))
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self.last - self.first

    def cut(self, columns: int) -> None:
        """Forget columns on the left, which are padding in all rows."""
        self.first += columns
        self._look()

    def keep(self, rows: Tensor) -> None:
        """Keep some rows."""
        assert self.room is not None
        used = (
            self.room[0][rows, :, self.first : self.last],
            self.room[1][rows, :, self.first : self.last],
        )
        self.first, self.last = 0, used[0].shape[-2]
        self._make(*used, len(rows), self.last, 0)
        self._look()


def joined(layers: Sequence[Layer]) -> Layer:
    """Return the rows of several layers as one, the shorter ones padded on the left."""
    lengths = [layer.get_seq_length() for layer in layers]
    longest = max(lengths)
    made = Layer()
    buffers = []
    rows = sum(len(layer.keys) for layer in layers)  # type: ignore[arg-type]
    for which in ("keys", "values"):
        like: Float[Tensor, "b h s d"] = getattr(layers[0], which)
        size = longest + max(SPARE, longest // 2)
        fresh = like.new_zeros(rows, like.shape[1], size, like.shape[3])
        at = 0
        for layer, length in zip(layers, lengths, strict=True):
            one = getattr(layer, which)
            fresh[at : at + len(one), :, longest - length : longest] = one
            at += len(one)
        buffers.append(fresh)
    made.room = (buffers[0], buffers[1])
    made.device, made.dtype = layers[0].device, layers[0].dtype
    made.last = longest
    made._look()
    return made


def empty() -> Any:
    """Return a cache for a prompt."""
    return hf.cache_utils.Cache(layer_class_to_replicate=Layer)


def join(caches: Sequence[Any]) -> Any:
    """Return one cache of the rows of several."""
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return hf.cache_utils.Cache(layers=[joined(group) for group in layers])


def keep(cache: Any, rows: Sequence[int], columns: int) -> None:
    """Keep some rows, and cut columns on the left that are padding in them all."""
    index = None
    for layer in cache.layers:
        if columns:
            layer.cut(columns)
        if index is None or index.device != layer.keys.device:
            index = torch.tensor(list(rows), device=layer.keys.device)
        layer.keep(index)

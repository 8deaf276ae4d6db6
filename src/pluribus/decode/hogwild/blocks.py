"""A run of tokens' keys and values, kept once, whoever reads them."""

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float
from pluribus.decode.hogwild.rotation import Rotation

ROOM = 32  # tokens that a block grows by, at least


class KVBlock:
    """Keys and values of some tokens by layer; keys turned by their places in the block.

    Places count from 0. Buffers grow by a quarter, so that a token costs no copy of the others.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._keys: dict[int, Tensor] = {}  # (heads, room, e)
        self._values: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

    def n(self, layer: int = 0) -> int:
        """Return the number of tokens; a layer's while a step is under way."""
        return self._lengths.get(layer, 0)

    def keys(self, layer: int) -> Float[Tensor, "h n e"]:
        """Return a layer's keys, a view."""
        return self._keys[layer][:, : self.n(layer)]

    def values(self, layer: int) -> Float[Tensor, "h n e"]:
        """Return a layer's values, a view."""
        return self._values[layer][:, : self.n(layer)]

    def append(
        self, layer: int, keys: Float[Tensor, "h n e"], values: Float[Tensor, "h n e"]
    ) -> None:
        """Put tokens behind the others; keys are turned by their places already."""
        old, more = self.n(layer), keys.shape[1]
        for kept, new in ((self._keys, keys), (self._values, values)):
            buffer = kept.get(layer)
            if buffer is None or buffer.shape[1] < old + more:
                room = old + more if buffer is None else max(old + more, old + old // 4) + ROOM
                grown = new.new_empty(new.shape[0], room, new.shape[2])
                if buffer is not None:
                    grown[:, :old] = buffer[:, :old]
                kept[layer] = buffer = grown
            buffer[:, old : old + more] = new
        self._lengths[layer] = old + more

    def clear(self) -> None:
        """Forget all tokens; the room is kept."""
        self.crop(0)

    def crop(self, n: int) -> None:
        """Keep the first n tokens. Raises InputError if there are fewer."""
        if not 0 <= n <= self.n():
            raise InputError(f"a block of {self.n()} tokens cannot be cut to {n}")
        for layer in self._lengths:
            self._lengths[layer] = n

    def move_into(self, other: "KVBlock", rotation: Rotation) -> None:
        """Put all tokens behind another block's, keys turned to their new places, and forget them.

        Turns add up, so this is exact but for rounding.
        """
        if other is self:
            raise InputError(f"block {self.name!r} cannot be moved into itself")
        if not self.n():
            return
        shift = torch.tensor(other.n(), device=self.keys(0).device)
        cos, sin = rotation.angles(shift)
        for layer in sorted(self._lengths):
            turned = rotation.turn(self.keys(layer), cos, sin)
            other.append(layer, turned, self.values(layer))
        self.clear()

    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        both = (*self._keys.values(), *self._values.values())
        return sum(tensor.nbytes for tensor in both)

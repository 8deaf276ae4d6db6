"""What one task adds to a shared base: deltas of its tensors, in one of several forms.

    low rank   b a                            (R, r) (r, c)     LoRA, Twin-Merging's SVD
    dense      values                         any shape         biases, norms, whole experts
    masked     bits * vector                  n bits            TALL masks on a shared vector
    scaled     (gain - 1) W, a gain a row     (R,)              IA3 on a layer's outputs
    bottleneck up act(down y), behind a layer (d, r) (r, d)     adapters; no delta of a tensor

A `Part` maps tensor names of the base to deltas (modules to bottlenecks). Axes behind the first
count as columns.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pluribus.core.errors import MismatchError
from pluribus.core.shapes import Float, Int, Shaped, UInt8

PIECE = 1 << 14  # bytes of a mask that are unpacked at a time: their values stay in a cache
Activation = Literal["relu", "gelu", "silu", "tanh", "identity"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """b a, reshaped to the tensor's shape."""

    a: Float[Tensor, "r c"]
    b: Float[Tensor, "R r"]

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise MismatchError(
                f"factors {list(self.b.shape)} and {list(self.a.shape)} do not multiply; expected "
                "(rows, rank) and (rank, columns)"
            )

    def delta(self, base: Tensor) -> Tensor:
        """Return the delta of a tensor."""
        return (self.b.to(base.dtype) @ self.a.to(base.dtype)).reshape(base.shape)

    def check(self, name: str, base: Tensor) -> None:
        """Raise MismatchError if it is not for a tensor of this shape."""
        columns = base.numel() // max(base.shape[0], 1) if base.ndim else 1
        if base.ndim < 2 or (len(self.b), self.a.shape[1]) != (base.shape[0], columns):
            raise MismatchError(
                f"{name} is {list(base.shape)} in the base, but the part's factors make "
                f"{[len(self.b), self.a.shape[1]]}; it was made for a model of another shape"
            )


@dataclass(frozen=True, eq=False)
class Dense:
    """All values."""

    values: Shaped[Tensor, "..."]

    def delta(self, base: Tensor) -> Tensor:
        """Return the delta of a tensor."""
        return self.values.reshape(base.shape)

    def check(self, name: str, base: Tensor) -> None:
        """Raise MismatchError if it is not for a tensor of this shape."""
        _same(name, self.values, base)


@dataclass(frozen=True, eq=False)
class Masked:
    """The places of a vector, shared by all tasks, at which a packed mask is set."""

    bits: UInt8[Tensor, " n8"]  # big-endian within a byte, as numpy.packbits packs
    vector: Shaped[Tensor, "..."]

    def delta(self, base: Tensor) -> Tensor:
        """Return the delta of a tensor."""
        return self.vector.reshape(base.shape) * unpacked(self.bits, base.numel()).view(base.shape)

    def write(self, base: Tensor, out: Tensor) -> None:
        """Write base plus delta to `out`, of the base's shape, a piece at a time."""
        base, vector, out = base.reshape(-1), self.vector.reshape(-1), out.view(-1)
        for start in range(0, len(self.bits), PIECE):
            bits = self.bits[start : start + PIECE]
            piece = slice(8 * start, min(8 * (start + PIECE), len(base)))
            mask = unpacked(bits, piece.stop - piece.start).to(vector.dtype)
            torch.addcmul(base[piece], vector[piece], mask, out=out[piece])

    def check(self, name: str, base: Tensor) -> None:
        """Raise MismatchError if it is not for a tensor of this shape."""
        _same(name, self.vector, base)
        if len(self.bits) != -(-base.numel() // 8):
            raise MismatchError(
                f"{name} has {base.numel()} values, but its mask {8 * len(self.bits)} bits"
            )


@dataclass(frozen=True, eq=False)
class Scaled:
    """A gain for each row of a tensor: of a linear layer, for each output."""

    gain: Float[Tensor, " R"]

    def delta(self, base: Tensor) -> Tensor:
        """Return the delta of a tensor."""
        return (self.gain - 1).reshape(-1, *[1] * (base.ndim - 1)) * base

    def check(self, name: str, base: Tensor) -> None:
        """Raise MismatchError if it is not for a tensor of this shape."""
        if not base.ndim or self.gain.shape != base.shape[:1]:
            raise MismatchError(
                f"{name} is {list(base.shape)} in the base; its gains are {list(self.gain.shape)}"
            )


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """y + up act(down y), behind a module whose output is y (b, ..., d)."""

    down: Float[Tensor, "r d"]
    down_bias: Float[Tensor, " r"]
    up: Float[Tensor, "d r"]
    up_bias: Float[Tensor, " d"]
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        r, d = self.down.shape
        if self.up.shape != (d, r) or self.down_bias.shape != (r,) or self.up_bias.shape != (d,):
            raise MismatchError(
                f"an adapter of down {list(self.down.shape)} needs up {[d, r]} and biases [{r}], "
                f"[{d}]; it has {list(self.up.shape)}, {list(self.down_bias.shape)}, "
                f"{list(self.up_bias.shape)}"
            )


Delta = LowRank | Dense | Masked | Scaled
Part = Mapping[str, Delta | Bottleneck]


def activated(name: Activation, x: Tensor) -> Tensor:
    """Return the activation's values."""
    return x if name == "identity" else getattr(torch.nn.functional, name)(x)


def unpacked(bits: UInt8[Tensor, " n8"], size: int) -> Tensor:
    """Return packed bits as a bool tensor (size,)."""
    eights = _eights(bits.device).index_select(0, bits.int())
    return eights.view(torch.bool)[:size]


@functools.lru_cache(maxsize=8)
def _eights(device: torch.device) -> Int[Tensor, "256"]:
    """Return, for every byte, eight bools that lie in memory as its bits do, as one number."""
    bits = torch.arange(256)[:, None] >> torch.arange(7, -1, -1) & 1
    return bits.to(torch.uint8).contiguous().view(torch.int64).flatten().to(device)


def packed(mask: Tensor) -> UInt8[Tensor, " n8"]:
    """Return a bool tensor as packed bits, the last byte filled up with zeros."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(7, -1, -1, device=mask.device)
    return (flat * weights).sum(1).to(torch.uint8)


def _same(name: str, values: Tensor, base: Tensor) -> None:
    if values.shape != base.shape:
        raise MismatchError(
            f"{name} is {list(base.shape)} in the base, but {list(values.shape)} in the part; it "
            "was made for a model of another shape"
        )

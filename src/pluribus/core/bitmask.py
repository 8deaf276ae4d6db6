"""Masks of one bit an element, packed eight to a byte, first element in the highest bit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pluribus.core.errors import MismatchError


def packed_size(size: int) -> int:
    """Bytes that `size` bits take."""
    return -(-size // 8)


@dataclass(frozen=True, eq=False)
class BitMask:
    """`size` bits in a uint8 array; spare bits of the last byte are 0."""

    packed: np.ndarray
    size: int

    def __post_init__(self) -> None:
        if self.packed.size != packed_size(self.size) or self.packed.dtype != np.uint8:
            raise MismatchError(
                f"{self.size} bits need {packed_size(self.size)} bytes, not {self.packed.size}"
            )

    @classmethod
    def of(cls, flags: np.ndarray) -> "BitMask":
        """Pack booleans, flattened."""
        return cls(np.packbits(np.asarray(flags, bool).reshape(-1)), flags.size)

    def flags(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return bits [start, stop) as booleans."""
        stop = self.size if stop is None else stop
        first = start // 8
        bits = np.unpackbits(self.packed[first : packed_size(stop)], count=stop - 8 * first)
        return bits[start - 8 * first :].astype(bool)

    def count(self) -> int:
        """Return how many bits are set."""
        return int(np.bitwise_count(self.packed).sum(dtype=np.int64))

    @property
    def share(self) -> float:
        """Share of the bits that are set; 0 for an empty mask."""
        return self.count() / self.size if self.size else 0.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitMask):
            return NotImplemented
        return self.size == other.size and np.array_equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: "BitMask") -> "BitMask":
        return BitMask(self.packed & self._other(other), self.size)

    def __or__(self, other: "BitMask") -> "BitMask":
        return BitMask(self.packed | self._other(other), self.size)

    def __xor__(self, other: "BitMask") -> "BitMask":
        return BitMask(self.packed ^ self._other(other), self.size)

    def __invert__(self) -> "BitMask":
        flipped = ~self.packed
        if self.size % 8:
            flipped[-1] &= np.uint8(0xFF << (8 - self.size % 8) & 0xFF)
        return BitMask(flipped, self.size)

    def _other(self, other: "BitMask") -> np.ndarray:
        if self.size != other.size:
            raise MismatchError(f"masks of {self.size} and {other.size} bits")
        return other.packed


def histogram(masks: Sequence[BitMask]) -> np.ndarray:
    """Return how many positions are set in exactly 0, 1, ... len(masks) of the masks."""
    counts = np.zeros(masks[0].size, np.int32)
    for mask in masks:
        counts += mask.flags()
    return np.bincount(counts, minlength=len(masks) + 1)

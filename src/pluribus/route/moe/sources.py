"""Lazy tensors that a mixture is made of: rounded, scaled or with noise, joined, and zeros.

Each reads any range of its elements on its own, so an assembly streams whatever its size.
"""

from collections.abc import Sequence

import numpy as np

from pluribus.core.dtypes import narrow
from pluribus.core.merger import At
from pluribus.core.random import uniform
from pluribus.core.shapes import Float32
from pluribus.core.source import Source, TensorSpec


class Changed(Source):
    """A tensor with noise, then times a factor, rounded once to an element type.

        (x + noise * z) * scale,    z standard normal

    z of an element depends on `seed` and `name` alone, not on how the tensor is read.
    """

    def __init__(
        self,
        source: Source,
        kind: str,
        *,
        noise: float = 0.0,
        scale: float = 1.0,
        seed: int = 0,
        name: str = "",
    ) -> None:
        self.source, self.noise, self.scale, self.seed, self.name = source, noise, scale, seed, name
        self.spec = TensorSpec(kind, source.spec.shape)
        self.near = source.near

    @property
    def fingerprint(self) -> str:
        """The source's, and what is done to it."""
        how = (self.spec.dtype, self.noise, self.scale, self.seed, self.name)
        return f"{self.source.fingerprint}:{how}"

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        if self.spec == self.source.spec and not self.noise and self.scale == 1:
            self.source.read(start, stop, out)
            return
        wide = np.float64 if "F64" in (self.spec.dtype, self.source.spec.dtype) else np.float32
        values = self.source.floats(start, stop, wide)
        if self.noise:
            at = At(name=self.name, start=start, stop=stop, seed=self.seed)
            values += wide(self.noise) * normal(at)
        if self.scale != 1:
            values *= wide(self.scale)
        out[...] = narrow(values, self.spec.kind)


def normal(at: At) -> Float32[np.ndarray, " n"]:
    """Draw a standard normal number for each element of a range (Box and Muller, 1958)."""
    like = np.empty(0, np.float32)
    radius = np.asarray(uniform(at, "moe/radius", like))
    angle = np.asarray(uniform(at, "moe/angle", like))
    return np.sqrt(-2 * np.log1p(-radius)) * np.cos(np.float32(2 * np.pi) * angle)


class Joined(Source):
    """Tensors of one element type, one behind the other along the first axis or a new one."""

    def __init__(self, parts: Sequence[Source], shape: tuple[int, ...]) -> None:
        self.parts, self.spec = tuple(parts), TensorSpec(parts[0].spec.dtype, shape)
        assert self.spec.size == sum(part.spec.size for part in parts)
        self.near = all(part.near for part in parts)

    @property
    def fingerprint(self) -> str:
        """Those of the parts."""
        return "joined:" + ",".join(part.fingerprint for part in self.parts)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        size, first = self.spec.kind.size, 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.spec.size)
            if low < high:
                at = (first + low - start) * size
                part.read(low, high, out[at : at + (high - low) * size])
            first += part.spec.size


class Beside(Source):
    """Matrices of one element type and as many rows, side by side."""

    def __init__(self, parts: Sequence[Source]) -> None:
        rows = parts[0].spec.shape[0]
        columns = sum(part.spec.shape[1] for part in parts)
        self.parts, self.spec = tuple(parts), TensorSpec(parts[0].spec.dtype, (rows, columns))
        self.near = all(part.near for part in parts)

    @property
    def fingerprint(self) -> str:
        """Those of the parts."""
        return "beside:" + ",".join(part.fingerprint for part in self.parts)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        if start == stop:
            return
        size, columns = self.spec.kind.size, self.spec.shape[1]
        first, last = start // columns, -(-stop // columns)  # whole rows around the range
        pieces = []
        for part in self.parts:
            wide = part.spec.shape[1]
            raw = part.load(first * wide, last * wide)
            pieces.append(raw.reshape(last - first, wide * size))
        flat = np.concatenate(pieces, 1).reshape(-1)
        at = (start - first * columns) * size
        out[...] = flat[at : at + out.size]


class Zeros(Source):
    """Nothing but zeros."""

    near = True

    def __init__(self, kind: str, shape: tuple[int, ...]) -> None:
        self.spec = TensorSpec(kind, shape)

    @property
    def fingerprint(self) -> str:
        """The same for all."""
        return "zeros"

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        out[...] = 0

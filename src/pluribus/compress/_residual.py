"""Bit-exact corrections: what turns a predicted tensor into the true one, in few bytes.

The difference of the two bit patterns, as whole numbers modulo 2^w, is small where the values are
close (a sign change is the exception). It is folded to unsigned (0, -1, 1, -2, ... to 0, 1, 2, 3,
...), split into its bytes' planes, so that the mostly zero high bytes lie together, and compressed
with zlib in chunks that can be read alone. Level 6 gains 1 to 3 % of the expert's bytes over level
1 and takes two to eight times as long (4 M normal weights, updates of relative size 1e-4 to 5e-2).
"""

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pluribus.compress._store import Spool, spans
from pluribus.core.dtypes import narrow
from pluribus.core.errors import FormatError
from pluribus.core.recent import Recent
from pluribus.core.source import Source, TensorSpec
from pluribus.core.weights import Weights

CHUNK = 1 << 18  # elements compressed together
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_chunks = Recent(64 << 20)


def encode(predicted: np.ndarray, true: np.ndarray, width: int, level: int = 1) -> bytes:
    """Compress the way from `predicted` to `true`, both raw bytes of elements of `width` bytes."""
    word = WORDS[width]
    a, b = true.view(word), predicted.view(word)
    gap = a - b
    sign = np.zeros_like(gap) - (gap >> word(8 * width - 1))
    folded = (gap << word(1)) ^ sign
    planes = np.ascontiguousarray(folded.view(np.uint8).reshape(-1, width).T)
    return zlib.compress(planes, level)


def decode(predicted: np.ndarray, packed: bytes, width: int) -> np.ndarray:
    """Return the true raw bytes. Raises FormatError if `packed` does not fit."""
    word = WORDS[width]
    try:
        planes = np.frombuffer(zlib.decompress(packed), np.uint8)
        folded = np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1).view(word)
        gap = (folded >> word(1)) ^ (np.zeros_like(folded) - (folded & word(1)))
        return (predicted.view(word) + gap).view(np.uint8)
    except (zlib.error, ValueError) as error:
        raise FormatError(f"a residual is damaged ({error}); build the store again") from None


def spool(name: str, predicted: Source, true: Source, into: Spool, level: int = 1) -> None:
    """Encode one tensor into two: the chunks' bytes, and where each begins."""
    begins = [0]

    def packed(span: tuple[int, int]) -> bytes:
        return encode(predicted.load(*span), true.load(*span), true.spec.kind.size, level)

    def chunks() -> Iterator[np.ndarray]:
        workers = os.cpu_count() or 1
        todo = list(spans(true.spec.size, CHUNK))
        with ThreadPoolExecutor(workers) as pool:
            for first in range(0, len(todo), 4 * workers):  # a few chunks in memory at a time
                for found in pool.map(packed, todo[first : first + 4 * workers]):
                    begins.append(begins[-1] + len(found))
                    yield np.frombuffer(found, np.uint8)

    into.add(f"data/{name}", chunks(), "U8")
    into.add(f"begins/{name}", [np.array(begins, np.int64)], "I64")


class Corrected(Source):
    """A predicted tensor with its residual: the true one, bit for bit."""

    def __init__(self, predicted: Source, data: Source, begins: Source) -> None:
        self.predicted, self.data, self.spec = predicted, data, predicted.spec
        self.begins = begins

    @classmethod
    def of(cls, name: str, predicted: Source, residual: Weights) -> "Corrected":
        """Take the residual of one tensor from what `spool` wrote."""
        return cls(predicted, residual.source(f"data/{name}"), residual.source(f"begins/{name}"))

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        size = self.spec.kind.size
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            (true,) = _chunks.get((self, chunk), lambda chunk=chunk: (self._chunk(chunk),))
            first = chunk * CHUNK
            a, b = max(start, first), min(stop, first + CHUNK)
            out[(a - start) * size : (b - start) * size] = true[
                (a - first) * size : (b - first) * size
            ]

    def _chunk(self, chunk: int) -> np.ndarray:
        begins = self.begins.load(chunk, chunk + 2).view(np.int64)
        start = chunk * CHUNK
        predicted = self.predicted.load(start, min(start + CHUNK, self.spec.size))
        packed = self.data.load(int(begins[0]), int(begins[1])).tobytes()
        return decode(predicted, packed, self.spec.kind.size)

    @property
    def fingerprint(self) -> str:
        """Those of its parts."""
        return f"corrected {self.predicted.fingerprint} {self.data.fingerprint}"


class Recast(Source):
    """The same values in another element type, rounded once."""

    def __init__(self, inner: Source, kind: str) -> None:
        self.inner, self.spec = inner, TensorSpec(kind, inner.spec.shape)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        wide = np.float64 if "F64" in (self.spec.dtype, self.inner.spec.dtype) else np.float32
        out[...] = narrow(self.inner.floats(start, stop, wide), self.spec.kind)

    @property
    def fingerprint(self) -> str:
        """The inner one's."""
        return f"{self.spec.dtype} {self.inner.fingerprint}"

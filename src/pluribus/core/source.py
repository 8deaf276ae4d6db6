"""Where a tensor's bytes come from: a file slice, an array, or another source seen differently.

A `Source` is one lazy tensor. It reads any range of its flattened elements, row-major, as raw
little-endian bytes, from any thread, and can be pickled to another process.
"""

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pluribus.core.dtypes import DType, dtype, widen
from pluribus.core.errors import FormatError, MissingError


class TensorSpec(NamedTuple):
    """Element type (safetensors spelling) and shape of a tensor; no data."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def kind(self) -> DType:
        """The element type's facts."""
        return dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.size * self.kind.size

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Source(ABC):
    """One lazy tensor. Subclasses set `spec` and implement `read`."""

    spec: TensorSpec
    near: bool = False  # whether many small reads cost little

    @abstractmethod
    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out` (uint8, (stop - start) * itemsize) with flattened elements [start, stop).

        Raises FormatError if the bytes are not there, NetworkError if a remote gave up.
        """

    @property
    def identity(self) -> Hashable:
        """What the tensor is stored in; equal identities are one shared tensor."""
        return id(self)

    @property
    def fingerprint(self) -> str:
        """Cheap text that changes when the bytes behind the source do (path, size, time)."""
        return ""

    def load(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read elements [start, stop) as raw bytes in a fresh array."""
        stop = self.spec.size if stop is None else stop
        out = np.empty((stop - start) * self.spec.kind.size, np.uint8)
        self.read(start, stop, out)
        return out

    def floats(
        self, start: int = 0, stop: int | None = None, wide: type = np.float32
    ) -> np.ndarray:
        """Read elements [start, stop), widened to float32 (or float64), flattened."""
        raw = self.load(start, stop)
        out = np.empty(raw.size // self.spec.kind.size, wide)
        widen(raw, self.spec.kind, out)
        return out


class _Files:
    """File descriptors by path, opened once per process and shared by all threads."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> int:
        found = self._open.get(path)
        if found is not None:
            return found[0]
        with self._lock:
            found = self._open.get(path)
            if found is None:
                try:
                    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                except FileNotFoundError:
                    raise MissingError(f"{path}: no such file") from None
                except OSError as error:
                    raise MissingError(f"{path}: cannot be opened ({error.strerror})") from None
                stat = os.fstat(fd)
                found = self._open[path] = (fd, (stat.st_dev, stat.st_ino))
            return found[0]

    def refresh(self, path: str) -> None:
        """Close a descriptor whose path now names another file (it was replaced)."""
        with self._lock:
            found = self._open.get(path)
            if found is None:
                return
            try:
                stat = os.stat(path)
                same = found[1] == (stat.st_dev, stat.st_ino)
            except OSError:
                same = False
            if not same:
                os.close(self._open.pop(path)[0])


files = _Files()


def read_exactly(path: str, offset: int, out: np.ndarray) -> None:
    """Fill `out` from byte `offset` of a file; raise FormatError if the file is too short."""
    view = memoryview(out).cast("B")
    done = 0
    fd = files.get(path)
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise FormatError(
                f"{path}: ends at byte {offset + done}, but a tensor goes on to byte "
                f"{offset + len(view)}; the file is truncated: copy or download it again"
            )
        done += got


def stamp(path: str) -> str:
    """Return path, size and modification time as text: the cheap fingerprint of a file."""
    stat = os.stat(path)
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


class FileSlice(Source):
    """Contiguous bytes of a local file."""

    near = True

    def __init__(self, path: str | Path, offset: int, spec: TensorSpec) -> None:
        self.path, self.offset, self.spec = str(path), offset, spec

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        read_exactly(self.path, self.offset + start * self.spec.kind.size, out)

    @property
    def identity(self) -> Hashable:
        """Path, offset and spec."""
        return (self.path, self.offset, self.spec)

    @property
    def fingerprint(self) -> str:
        """Path, size and time of the file, and the offset in it."""
        return f"{stamp(self.path)}:{self.offset}"


class ArraySource(Source):
    """An array already in memory. `raw` holds its little-endian bytes, flattened."""

    near = True

    def __init__(self, raw: np.ndarray, spec: TensorSpec, owner: object = None) -> None:
        self.raw, self.spec = raw.reshape(-1).view(np.uint8), spec
        self._owner = owner  # keeps a torch storage alive while its bytes are viewed

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        size = self.spec.kind.size
        out[...] = self.raw[start * size : stop * size]

    @property
    def identity(self) -> Hashable:
        """Address of the bytes."""
        return (self.raw.__array_interface__["data"][0], self.spec)

    @property
    def fingerprint(self) -> str:
        """Hash of the bytes: an array has no modification time."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(memoryview(self.raw))

    def __getstate__(self) -> dict:
        return {"raw": np.array(self.raw), "spec": self.spec, "_owner": None}

    @classmethod
    def of(cls, array: np.ndarray | np.generic, kind: str) -> "ArraySource":
        """Wrap a contiguous array whose element type is `kind` in safetensors spelling."""
        shape = tuple(array.shape)  # ascontiguousarray would give a 0-d array an axis
        return cls(np.ascontiguousarray(array), TensorSpec(kind, shape))

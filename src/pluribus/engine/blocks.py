"""Read blocks of all inputs into working precision, and encode merged ones; one per thread."""

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pluribus.core.arrays import Array, is_torch
from pluribus.core.dtypes import first_nonfinite, narrow, widen
from pluribus.core.merger import At, columns
from pluribus.core.source import Source
from pluribus.engine.plan import SPAN, Job

OUT = "\0"  # the output among hashes by label; no model is called so


@dataclass(frozen=True)
class Span:
    """A run of blocks that one thread works through."""

    job: Job
    number: int

    @property
    def blocks(self) -> range:
        """The blocks' numbers."""
        first = self.number * SPAN
        return range(first, min(first + SPAN, self.job.blocks))


class HeldBlock(NamedTuple):
    """One packed block of all inputs, and the hashes of those that have been read."""

    rows: np.ndarray  # (sources, n) uint16
    digests: list[str]
    room: np.ndarray  # the memory that the rows lie in


class Held:
    """Packed inputs of tensors that are read more than once, as long as they are needed.

    Copies a tensor's blocks at their first reading, if all that are held stay below `limit` bytes.
    Used by all threads; a block is only ever asked for by one at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._blocks: dict[int, dict[int, HeldBlock]] = {}  # job -> block
        self._free: list[np.ndarray] = []  # memory to use again: new pages are slow to get
        self._lock = threading.Lock()

    def block(self, job: Job, number: int) -> HeldBlock | None:
        """Return where a block of a job is held or is to be held, or None."""
        if job.passes == 1:
            return None
        size = job.experts[0].spec.size
        need = job.blocks * job.block * len(job.sources) * 2
        with self._lock:
            blocks = self._blocks.get(job.index)
            if blocks is None:
                if self.size + need > self.limit:
                    return None
                self.size += need
                blocks = self._blocks[job.index] = {}
            found = blocks.get(number)
            if found is not None:
                return found
            room = self._free.pop() if self._free else None
        count = min(job.block, size - number * job.block)
        whole = len(job.sources) * count
        if room is None or room.size < whole:
            room = np.empty(len(job.sources) * job.block, np.uint16)
        rows = room[:whole].reshape(len(job.sources), count)
        blocks[number] = found = HeldBlock(rows, [""] * len(job.sources), room)
        return found

    def release(self, job: Job) -> None:
        """Let go of a job's blocks."""
        with self._lock:
            blocks = self._blocks.pop(job.index, None)
            if blocks is not None:
                self.size -= job.blocks * job.block * len(job.sources) * 2
                self._free += [block.room for block in blocks.values()]


class Reader:
    """Reads blocks into scratch memory that it reuses. Not shared between threads."""

    def __init__(self, device: str = "cpu", held: "Held | None" = None) -> None:
        self.held = held
        self.bad: list[int] = []  # inputs of the last block that held NaN or infinity
        self.device = device
        self._raw = np.empty(0, np.uint8)
        self._floats: dict[type, np.ndarray] = {}
        self._merged = np.empty(0, np.uint16)
        self._gpu: Any = None

    def read(
        self,
        job: Job,
        at: At,
        digests: dict[str, list[str]] | None,
        *,
        packed: bool = False,
        check: bool = True,
    ) -> tuple[Array | None, Array, dict[str, Array]]:
        """Return base, experts (t, ...) and extras of one block, in the method's grain.

        The arrays are valid until the next call. With `digests`, the inputs' bytes are hashed.
        `packed` leaves bfloat16 as it is in the files, in arrays of uint16. Without `check` nobody
        looks for NaN and infinity in a packed block.
        """
        sources = job.sources
        count = at.stop - at.start
        kept = self.held.block(job, at.block) if packed and self.held is not None else None
        if kept is not None:
            block = kept.rows
        else:
            kind = np.uint16 if packed else job.wide
            block = self._scratch(kind, len(sources) * count).reshape(len(sources), count)
        self.bad = []
        for i, source in enumerate(sources):
            raw = block[i].view(np.uint8) if packed else None
            if kept is None or not kept.digests[i] or raw is None:
                raw = self._read_raw(source, at, raw)
            known = "" if kept is None else kept.digests[i]
            if not known and (digests is not None or kept is not None):
                known = self.digest(raw)  # at once, while the bytes are near
                if kept is not None:
                    kept.digests[i] = known
            if digests is not None:
                label = job.labels[i] if i < len(job.labels) else str(i)
                if label not in job.labels[:i]:  # a model may take part twice
                    digests.setdefault(label, []).append(known)
            if not packed and not widen(raw, source.spec.kind, block[i]):
                self.bad.append(i)
        if packed and check and (bad := first_nonfinite(block)) is not None:
            self.bad.append(bad)
        shape = self._shape(job, count)
        rows: Array = block
        if self.device != "cpu":
            rows = self._upload(block)
        base = rows[0].reshape(shape) if job.base is not None else None
        experts = rows[1:] if job.base is not None else rows
        experts = experts.reshape(len(job.experts), *shape)
        extras = {name: self._extra(group, job, at) for name, group in job.extras.items()}
        return base, experts, extras

    def space(self, job: Job, at: At) -> np.ndarray | None:
        """Return where a kernel may put a packed result, until the next call; None if it is not."""
        if job.spec.dtype != "BF16" or job.wide is not np.float32:
            return None
        count = at.stop - at.start
        if self._merged.size < count:
            self._merged = np.empty(count, np.uint16)
        return self._merged[:count].reshape(self._shape(job, count))

    def encode(self, merged: Any, job: Job) -> np.ndarray:
        """Round a merged block to the output's element type; return its bytes."""
        if is_torch(merged):
            merged = merged.detach().to("cpu").numpy()
        merged = np.asarray(merged)
        if merged.dtype == np.uint16:  # packed by a kernel
            return merged.reshape(-1).view(np.uint8)
        if merged.dtype not in (np.float32, np.float64):
            merged = merged.astype(job.wide)
        return narrow(merged.reshape(-1), job.spec.kind)

    @staticmethod
    def digest(raw: np.ndarray) -> str:
        """Return the hash of a block's bytes."""
        return xxhash.xxh3_128_hexdigest(memoryview(raw))

    def _read_raw(self, source: Source, at: At, raw: np.ndarray | None) -> np.ndarray:
        if raw is None:
            size = (at.stop - at.start) * source.spec.kind.size
            if self._raw.size < size:
                self._raw = np.empty(size, np.uint8)
            raw = self._raw[:size]
        source.read(at.start, at.stop, raw)
        return raw

    def _scratch(self, wide: type, size: int) -> np.ndarray:
        found = self._floats.get(wide)
        if found is None or found.size < size:
            found = self._floats[wide] = np.empty(size, wide)
        return found[:size]

    @staticmethod
    def _shape(job: Job, count: int) -> tuple[int, ...]:
        grain = job.facts.grain
        shape = job.experts[0].spec.shape
        if grain == "tensor":
            return shape
        if grain == "element":
            return (count,)
        cols = columns(grain, shape)
        return (count // max(cols, 1), cols)

    def _extra(self, group: tuple[Source, ...], job: Job, at: At) -> Array:
        same = all(source.spec.shape == at.shape for source in group)
        if same:
            rows = np.stack([source.floats(at.start, at.stop, job.wide) for source in group])
            out = rows.reshape(len(group), *self._shape(job, at.stop - at.start))
        else:
            out = np.stack([s.floats(wide=job.wide).reshape(s.spec.shape) for s in group])
        return self._upload(out) if self.device != "cpu" else out

    def _upload(self, block: np.ndarray) -> Array:
        if self._gpu is None:
            from pluribus.engine.device import Uploader

            self._gpu = Uploader(self.device)
        return self._gpu(block)

"""`TwinStore`: a shared expert and, for every task, a compressed exclusive part.

    theta(w) = theta* + sum_t w_t e_t      rounded once, to the shared expert's type

The store is whole: it needs no base. A part is kept densely, as two low-rank factors, or as a mask
with the values it keeps; tensors of single tasks (heads) are kept as they are.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pluribus.compress._store import (
    known_task,
    manifest,
    opened,
    saved,
    staged,
    whole,
    wide_of,
    write_manifest,
)
from pluribus.core.bitmask import BitMask, packed_size
from pluribus.core.dtypes import narrow
from pluribus.core.errors import InputError
from pluribus.core.recent import Recent
from pluribus.core.source import Source
from pluribus.core.weights import Weights

STEP = 1 << 16  # elements between two entries of a sparse part's running count
_factors = Recent(256 << 20)


@runtime_checkable
class Part(Protocol):
    """One task's exclusive part of one tensor."""

    def add(self, values: np.ndarray, start: int, weight: float) -> None:
        """Add weight * e to `values`, the elements from `start` on."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """All values."""

    values: Source

    def add(self, values: np.ndarray, start: int, weight: float) -> None:
        """See `Part`."""
        part = self.values.floats(start, start + values.size, values.dtype.type)
        values += part if weight == 1 else part * values.dtype.type(weight)


@dataclass(frozen=True, eq=False)
class LowRank:
    """b @ a: (rows, k) and (k, columns)."""

    a: Source
    b: Source

    def add(self, values: np.ndarray, start: int, weight: float) -> None:
        """See `Part`."""
        from pluribus.kernels.lowrank import add_low_rank

        wide = values.dtype.type
        b, a = _factors.get((self, wide), lambda: self._load(wide))
        add_low_rank(values, start, b, a, wide(weight), np.empty(a.shape[1], wide))

    def _load(self, wide: type) -> tuple[np.ndarray, np.ndarray]:
        return (
            self.b.floats(wide=wide).reshape(self.b.spec.shape),
            self.a.floats(wide=wide).reshape(self.a.spec.shape),
        )


@dataclass(frozen=True, eq=False)
class Sparse:
    """The values where a packed mask is set, in order; `seen` counts those before each STEP."""

    mask: Source
    seen: Source
    kept: Source

    def add(self, values: np.ndarray, start: int, weight: float) -> None:
        """See `Part`."""
        stop = start + values.size
        step = start // STEP
        first = step * STEP
        packed = self.mask.load(first // 8, packed_size(stop))
        flags = BitMask(packed, stop - first).flags()
        before = int(self.seen.load(step, step + 1).view(np.int64)[0])
        begin = before + int(np.count_nonzero(flags[: start - first]))
        flags = flags[start - first :]
        end = begin + int(np.count_nonzero(flags))
        wide = values.dtype.type
        values[flags] += self.kept.floats(begin, end, wide) * wide(weight)


class Mixed(Source):
    """A shared tensor plus weighted parts, in the tasks' order, rounded once."""

    def __init__(self, shared: Source, parts: Sequence[tuple[float, Part]]) -> None:
        self.shared, self.parts, self.spec = shared, parts, shared.spec

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        values = self.shared.floats(start, stop, wide_of(self.shared))
        for weight, part in self.parts:
            part.add(values, start, weight)
        out[...] = narrow(values, self.spec.kind)


@dataclass(frozen=True)
class TwinStore:
    """A shared expert and exclusive parts. `twin[task]` is one expert; `materialise` mixes them."""

    shared: Weights
    parts: Mapping[str, Weights]  # by task: tensors named form/name
    own: Mapping[str, Weights]
    names: tuple[str, ...]
    sizes: Mapping[str, int]  # bytes of the experts' checkpoints
    about: Mapping[str, Any]
    kept: Mapping[str, float]  # by task: share of ||e_t||^2 that its part holds
    folder: Path | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names, in the order they were given."""
        return tuple(self.parts)

    def part(self, task: str, name: str) -> Part | None:
        """Return a task's exclusive part of a tensor; None if it is zero."""
        known_task(task, self.tasks)
        found = self.parts[task]
        if f"dense/{name}" in found:
            return Dense(found.source(f"dense/{name}"))
        if f"a/{name}" in found:
            return LowRank(found.source(f"a/{name}"), found.source(f"b/{name}"))
        if f"kept/{name}" in found:
            return Sparse(*(found.source(f"{form}/{name}") for form in ("mask", "seen", "kept")))
        return None

    def __getitem__(self, task: str) -> Weights:
        known_task(task, self.tasks)
        return self.materialise({task: 1.0})

    def expand(self, task: str) -> Weights:
        """Return one expert, lazily. Raises KeyError with the nearest task."""
        return self[task]

    def materialise(
        self, weights: Mapping[str, float] | Sequence[float], *, task: str | None = None
    ) -> Weights:
        """Return theta* + sum_t w_t e_t, lazily; absent tasks weigh 0.

        Tensors that tasks keep for themselves (heads) come from `task`, or from the only one that
        has a weight; of several, the shared expert's stand where it has them. Raises KeyError for
        an unknown task, InputError for weights that are not numbers, one for each task.
        """
        if not isinstance(weights, Mapping):
            if len(weights) != len(self.tasks):
                raise InputError(f"{len(weights)} weights were given for {len(self.tasks)} tasks")
            weights = dict(zip(self.tasks, weights, strict=True))
        for name in [*weights, *([] if task is None else [task])]:
            known_task(name, self.tasks)
        bad = [name for name, weight in weights.items() if not np.isfinite(weight)]
        if bad:
            raise InputError(f"the weight of {bad[0]} is {weights[bad[0]]}")
        used = [name for name in self.tasks if weights.get(name, 0)]
        if task is None and len(used) == 1:
            task = used[0]
        sources: dict[str, Source] = {}
        for name in self.names:
            parts = [(float(weights[t]), self.part(t, name)) for t in used]
            mixed = [(weight, part) for weight, part in parts if part is not None]
            if mixed:
                sources[name] = Mixed(self.shared.source(name), mixed)
        own = self.own[task] if task is not None else Weights({})
        return whole(self.shared, sources, own, task or "mixture")

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the shared expert, the parts and a manifest. Raises OutputError if it exists."""
        with staged(folder, overwrite) as stage:
            self.shared.save(stage / "shared.safetensors")
            self.write(stage, {task: None for task in self.tasks})

    def write(self, stage: Path, written: Mapping[str, str | None]) -> None:
        """Write all but the shared expert and the parts whose file names are given."""
        tasks = []
        for number, task in enumerate(self.tasks):
            stem = f"{number:03d}.safetensors"
            parts = written[task] or saved(self.parts[task], stage, f"part-{stem}")
            own = saved(self.own[task], stage, f"own-{stem}")
            told = {"bytes": self.sizes[task], "kept": self.kept[task]}
            tasks.append({"name": task, "parts": parts, "own": own, **told})
        table = {
            "kind": "twins",
            "method": "twin",
            "parameters": dict(self.about),
            "names": list(self.names),
            "shared": "shared.safetensors",
            "folder": str(self.shared.folder) if self.shared.folder else None,
            "tasks": tasks,
        }
        write_manifest(stage, table)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], base: Any = None, *, verify: bool | None = None
    ) -> "TwinStore":
        """Open a saved store. A base is not needed; if given, its configuration goes along."""
        del verify
        folder = Path(os.path.expanduser(folder))
        table = manifest(folder)
        shared = opened(folder, table["shared"])
        home = Weights.open(base).folder if base is not None else table["folder"]
        home = Path(home) if home is not None and Path(home).is_dir() else None
        shared = Weights(
            {name: shared.source(name) for name in shared.spec},
            label=shared.label,
            aliases=shared.aliases,
            folder=home,
        )
        tasks = table["tasks"]
        return cls(
            shared,
            {told["name"]: opened(folder, told["parts"]) for told in tasks},
            {told["name"]: opened(folder, told["own"]) for told in tasks},
            tuple(table["names"]),
            {told["name"]: told["bytes"] for told in tasks},
            table["parameters"],
            {told["name"]: told["kept"] for told in tasks},
            folder,
        )

    def ranks(self, task: str) -> dict[str, int]:
        """Return the rank of each low-rank part."""
        found = self.parts[task]
        return {
            name: found.source(f"a/{name}").spec.shape[0]
            for name in self.names
            if f"a/{name}" in found
        }

    def report(self) -> dict[str, Any]:
        """Return bytes of all parts against those of the checkpoints, ranks, and kept energy.

        `ratio` is store / checkpoints; `kept` the share of ||e_t||^2 that a part holds.
        """
        tasks = {
            task: {
                "bytes": self.parts[task].nbytes + self.own[task].nbytes,
                "own_bytes": self.own[task].nbytes,
                "checkpoint_bytes": self.sizes[task],
                "kept": self.kept[task],
                "largest_rank": max(self.ranks(task).values(), default=None),
            }
            for task in self.tasks
        }
        store = self.shared.nbytes + sum(told["bytes"] for told in tasks.values())
        checkpoints = sum(self.sizes.values())
        return {
            "method": "twin",
            "shared_bytes": self.shared.nbytes,
            "store_bytes": store,
            "checkpoints_bytes": checkpoints,
            "ratio": store / max(checkpoints, 1),
            "tasks": tasks,
        }

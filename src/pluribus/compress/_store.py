"""What stores have in common: folder and manifest, the base's check, which tensors are shared."""

import contextlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import xxhash

from pluribus.core.dtypes import dtype
from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    OutputError,
    PluribusError,
    listing,
    nearest,
)
from pluribus.core.merger import _checked
from pluribus.core.source import ArraySource, FileSlice, Source, TensorSpec, files
from pluribus.core.weights import Weights

MANIFEST = "store.json"
UNFINISHED = ".unfinished"  # marks a folder in which a store is being made
FORMAT = "pluribus-store"
VERSION = 1
CHUNK = 1 << 20  # elements read at a time, a multiple of 8
BUFFERS = (r"(^|\.)(running_mean|running_var|num_batches_tracked)$",)
COMPRESSOR = "__pluribus_compressor__"
C = TypeVar("C", bound=type)


@runtime_checkable
class Store(Protocol):
    """Compressed experts."""

    tasks: tuple[str, ...]

    def expand(self, task: str) -> Weights:
        """Return one expert, lazily. Raises KeyError with the nearest task."""
        ...

    def report(self) -> dict[str, Any]:
        """Return sizes in bytes and what else is known, as plain values."""
        ...

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the store. Raises OutputError if the folder exists."""
        ...


@dataclass(frozen=True)
class About:
    """What is known about a compressor without running it."""

    name: str
    paper: str
    summary: str


def compressor_facts(name: str, *, paper: str = "") -> Callable[[C], C]:
    """Register a compressor's facts, and make its construction check its parameters."""

    def decorate(cls: C) -> C:
        doc = inspect.getmodule(cls)
        summary = ((doc.__doc__ if doc else None) or "").strip().split("\n")[0]
        setattr(cls, COMPRESSOR, About(name, paper, summary))
        _checked(cls, name)
        return cls

    return decorate


# -- which tensors are shared ----------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A base and experts: the tensors that are compressed, and what each task keeps for itself."""

    base: Weights
    experts: Mapping[str, Weights]
    shared: tuple[str, ...]
    own: Mapping[str, Weights]  # tensors that differ from the base and are kept as they are

    def of(self, weights: Weights) -> Weights:
        """Return only the shared tensors of a model."""
        names = set(self.shared)
        sources = {name: weights.source(name) for name in self.shared}
        aliases = {a: to for a, to in self.base.aliases.items() if to in names}
        return Weights(sources, label=weights.label, aliases=aliases, folder=weights.folder)


def split(base: Any, experts: Mapping[str, Any], exclude: tuple[str, ...] = ()) -> Split:
    """Compare models from headers; `exclude` are regular expressions of names kept per task.

    Whole-number tensors, batch-norm statistics and tensors that the base lacks (heads) are each
    task's own. Raises MismatchError naming tensor, model and shapes, InputError without experts.
    """
    base = Weights.open(base)
    if not isinstance(experts, Mapping) or not experts:
        raise InputError("give the experts as a mapping from task names to models")
    models = {task: Weights.open(what, label=task) for task, what in experts.items()}
    patterns = [_pattern(text) for text in (*BUFFERS, *exclude)]
    shared = []
    for name, spec in base.spec.items():
        if not spec.kind.is_float or any(p.search(name) for p in patterns):
            continue
        for task, model in models.items():
            if name not in model:
                raise MismatchError(
                    f"{task} has no tensor {name!r}, which {base.label} has.{nearest(name, model)} "
                    "Leave tensors of single tasks to them with exclude"
                )
            other = model.source(name).spec
            if other.shape != spec.shape or not other.kind.is_float:
                raise MismatchError(
                    f"tensor {name!r} is {spec} in {base.label}, but {other} in {task}; "
                    "leave it to each task with exclude"
                )
        shared.append(name)
    if not shared:
        raise InputError(f"no floating-point tensor of {base.label} is left to be shared")
    own = {task: _own(base, model, set(shared)) for task, model in models.items()}
    return Split(base, models, tuple(shared), own)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"exclude: {text!r} is not a regular expression ({error})") from None


def _own(base: Weights, model: Weights, shared: set[str]) -> Weights:
    sources = {}
    for name in model.spec:
        if name in shared:
            continue
        mine = model.source(name)
        if name in base and same(base.source(name), mine):
            continue
        sources[name] = mine
    return Weights(sources, label=model.label)


def same(one: Source, other: Source) -> bool:
    """Return whether two tensors have the same type, shape and bytes."""
    if one.spec != other.spec:
        return False
    return one.identity == other.identity or all(
        np.array_equal(one.load(start, stop), other.load(start, stop))
        for start, stop in spans(one.spec.size)
    )


def spans(size: int, chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield the ranges of elements that a tensor is worked through in."""
    for start in range(0, size, chunk):
        yield start, min(start + chunk, size)


def whole(
    base: Weights, shared: Mapping[str, Source], own: Weights, task: str, extra: bool = True
) -> Weights:
    """Put an expert together: shared tensors, its own ones, and the rest from the base."""
    sources = {}
    for name in base.spec:
        if name in own:
            sources[name] = own.source(name)
        else:
            sources[name] = shared.get(name, base.source(name))
    if extra:
        sources |= {name: own.source(name) for name in own if name not in sources}
    aliases = {a: to for a, to in base.aliases.items() if a not in sources}
    return Weights(sources, label=task, aliases=aliases, folder=base.folder)


def known_task(task: str, tasks: tuple[str, ...]) -> None:
    """Raise KeyError with the nearest name unless there is such a task."""
    if task not in tasks:
        raise KeyError(f"no expert is called {task!r}; there are: {listing(tasks, 20)}."
                       + nearest(task, tasks))  # fmt: skip


# -- the base's identity ---------------------------------------------------------------------------


def identify(base: Weights) -> dict[str, Any]:
    """Return what a manifest says of the base: label, headers, content, and a cheap fingerprint."""
    return {
        "label": base.label,
        "headers": _headers(base),
        "content": content(base),
        "fingerprint": _fingerprint(base),
        "bytes": base.nbytes,
    }


def _headers(weights: Weights) -> str:
    told = sorted((name, str(spec)) for name, spec in weights.spec.items())
    return xxhash.xxh3_128_hexdigest(repr(told).encode())


def _fingerprint(weights: Weights) -> str:
    told = [weights.source(name).fingerprint for name in weights.spec]
    return xxhash.xxh3_128_hexdigest(repr(told).encode())


def content(weights: Weights) -> str:
    """Return the hash of all tensors' bytes, in the order of their names."""
    state = xxhash.xxh3_128()
    for name in sorted(weights.spec):
        source = weights.source(name)
        one = xxhash.xxh3_128()
        for start, stop in spans(source.spec.size):
            one.update(memoryview(source.load(start, stop)))
        state.update(f"{name}\0{source.spec}\0{one.hexdigest()}\0".encode())
    return state.hexdigest()


def check_base(base: Weights, told: Mapping[str, Any], where: Path, verify: bool | None) -> None:
    """Raise MismatchError unless `base` is the one a store was made for."""
    if _headers(base) != told["headers"]:
        raise MismatchError(
            f"{where} was made for {told['label']}, whose tensors have other names, types or "
            f"shapes than those of {base.label}"
        )
    if verify is False or (verify is None and _fingerprint(base) == told["fingerprint"]):
        return
    if content(base) != told["content"]:
        raise MismatchError(
            f"{where} was made for another base: the values of {base.label} are not those of "
            f"{told['label']}; experts rebuilt on it would be wrong"
        )


# -- folders ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Give a staging folder beside `folder`; if all goes well it takes its name, whole.

    Only a store is ever replaced. Raises OutputError if the folder exists and may not be replaced,
    or cannot be written.
    """
    from pluribus.engine.driver import target_of
    from pluribus.engine.sink import check_parent

    out = target_of(folder)
    stage = out.with_name(out.name + ".partial")
    old = out.with_name(out.name + ".replaced")
    if _is_store(old) and not out.exists():  # killed between the two renames
        os.replace(old, out)
    if out.exists() and not overwrite:
        raise OutputError(
            f"{out}: exists already; choose another name, or pass --overwrite to replace it once "
            "the new store is whole"
        )
    for place in (out, stage, old):
        if place.exists() and not _is_store(place):
            raise OutputError(
                f"{place}: is no store, and writing {out.name} would remove it; choose another name"
            )
    check_parent(out)
    try:
        for place in (stage, old):
            if place.exists():
                shutil.rmtree(place)
        stage.mkdir()
        (stage / UNFINISHED).touch()
        yield stage
        (stage / UNFINISHED).unlink()
        if out.exists():
            os.replace(out, old)
        os.replace(stage, out)
        if old.exists():
            shutil.rmtree(old)
        for entry in out.iterdir():
            files.refresh(str(entry))
            files.refresh(str(stage / entry.name))
    except OSError as error:
        if isinstance(error, PluribusError):
            raise
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        if _is_store(stage):
            shutil.rmtree(stage, ignore_errors=True)


def _is_store(folder: Path) -> bool:
    """Return whether a folder is empty, or a store, or the beginning of one, and no model."""
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir()}
    model = names & {"config.json", "model.safetensors", "model.safetensors.index.json"}
    return not names or (bool(names & {MANIFEST, UNFINISHED}) and not model)


def write_manifest(folder: Path, table: Mapping[str, Any]) -> None:
    """Write a store's JSON."""
    told = {"format": FORMAT, "version": VERSION, **table}
    (folder / MANIFEST).write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def manifest(folder: Path) -> dict[str, Any]:
    """Read a store's JSON. Raises MissingError or FormatError."""
    where = Path(os.path.expanduser(folder)) / MANIFEST
    if not where.is_file():
        raise MissingError(f"{where.parent}: no store in it ({MANIFEST} is not there)")
    try:
        table = json.loads(where.read_bytes())
        if not isinstance(table, dict) or table.get("format") != FORMAT:
            raise ValueError("another format")
        if table["kind"] not in ("bank", "twins") or not isinstance(table["tasks"], list):
            raise ValueError("kind or tasks")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not the manifest of a store ({error!r})") from None
    if table.get("version") != VERSION:
        raise FormatError(
            f"{where}: version {table.get('version')!r} of the format; this release reads {VERSION}"
        )
    return table


def opened(folder: Path, name: str | None) -> Weights:
    """Open one file of a store; without a name there are no tensors."""
    if name is None:
        return Weights({})
    if not (folder / name).is_file():
        raise MissingError(f"{folder / name}: named by the manifest, but not there")
    return Weights.open(folder / name)


def saved(weights: Weights, folder: Path, name: str) -> str | None:
    """Write one file of a store, unless it would be empty; return its name."""
    if not len(weights):
        return None
    apart = {key: Apart(weights.source(key)) for key in weights}  # a store keeps no aliases
    Weights(apart).save(folder / name)
    return name


class Apart(Source):
    """A tensor that is stored for itself, even if another one shares its bytes."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.spec = inner, inner.spec

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        self.inner.read(start, stop, out)


class Spool:
    """Tensors whose sizes are known only when they are made: kept in memory, or in one raw file."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file = path.open("wb") if path else None
        self._sources: dict[str, Source] = {}

    def add(
        self,
        name: str,
        parts: Iterable[np.ndarray],
        kind: str,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Append a tensor given in parts; `kind` is its element type in safetensors spelling.

        Without `shape` it has one axis.
        """
        start = 0 if self._file is None else self._file.tell()
        kept, size = [], 0
        for part in parts:
            raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            size += raw.size
            if self._file is None:
                kept.append(raw)
            else:
                self._file.write(memoryview(raw))
        spec = TensorSpec(kind, (size // dtype(kind).size,) if shape is None else shape)
        if self._file is None:
            joined = np.concatenate([*kept, np.empty(0, np.uint8)])
            self._sources[name] = ArraySource(joined, spec)
        else:
            self._sources[name] = FileSlice(self._path, start, spec)  # type: ignore[arg-type]

    def weights(self, label: str) -> Weights:
        """Return all of them."""
        if self._file is not None:
            self._file.close()
            files.refresh(str(self._path))
        return Weights({k: Apart(v) for k, v in self._sources.items()}, label=label)

    def save(self, folder: Path, name: str) -> str | None:
        """Write them as one safetensors file, and drop the raw one."""
        out = saved(self.weights(name), folder, name)
        if self._path is not None:
            self._path.unlink()
            files.refresh(str(self._path))
        return out


def wide_of(*sources: Source) -> type:
    """Return the working precision of tensors: float64 if one of them is, else float32."""
    return np.float64 if any(s.spec.dtype == "F64" for s in sources) else np.float32

"""`Weights`: an immutable, ordered mapping from names to tensors that reads nothing until asked.

A `Weights` is opened from a file, a folder, an address, a hub repository, a state dict or a module;
`.spec` answers from headers alone, indexing reads one tensor, `.source(name)` reads any range.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pluribus.core import formats
from pluribus.core.dtypes import dtype, narrow, numpy_dtype
from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    MissingError,
    listing,
    nearest,
)
from pluribus.core.formats.safetensors import header_bytes
from pluribus.core.refs import ModelRef, Place
from pluribus.core.source import ArraySource, Source, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
CARRIED = (".json", ".jinja", ".txt", ".model", ".py", ".md", ".spm", ".tiktoken")


class Weights(Mapping[str, Any]):
    """Named lazy tensors. `aliases` are further names of tensors that are kept once.

    `folder` is the model folder whose configuration and tokenizer files go with the tensors.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        label: str = "weights",
        aliases: Mapping[str, str] | None = None,
        folder: Path | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        sources, aliases = dict(sources), dict(aliases or {})
        seen: dict[Any, str] = {}
        for name, source in list(sources.items()):
            first = seen.setdefault(source.identity, name)
            if first != name and source.spec.size:
                aliases[name] = first
                del sources[name]
        # A target may itself have turned out to be another name, and may be absent.
        aliases = {name: aliases.get(target, target) for name, target in aliases.items()}
        self._sources = sources
        self.aliases: Mapping[str, str] = {
            name: target
            for name, target in aliases.items()
            if target in sources and name not in sources
        }
        self.label = label
        self.folder = folder
        self.metadata: Mapping[str, str] = dict(metadata or {})

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, what: Any, *, label: str | None = None) -> "Weights":
        """Open a path, address, hub reference, `ModelRef`, state dict, or module.

        Raises MissingError, FormatError or NetworkError saying what was looked for and where.
        """
        if isinstance(what, Weights):
            return what
        if isinstance(what, Mapping) and "model" not in what:
            return cls.of(what, label=label or "state dict")
        if (state := getattr(what, "state_dict", None)) is not None:
            return cls.of(state(), label=label or type(what).__name__)
        ref = what if isinstance(what, ModelRef) else ModelRef.of(what)
        weights = cls._open_place(ref.model)
        if ref.lora is not None:
            from pluribus.core.lowrank import with_adapter

            weights = with_adapter(weights, cls._folder_of(ref.lora), label=str(ref))
        weights.label = label or str(ref)
        return weights

    @classmethod
    def _folder_of(cls, place: Place) -> Path:
        """Return a local path for `place`, downloading a hub repository into its cache."""
        path = Path(os.path.expanduser(place.path))
        if path.exists():
            return path
        if "://" in place.path or not _looks_like_repo(place.path):
            raise MissingError(f"{place.path}: no such file or folder")
        from pluribus.core.hub import snapshot

        return snapshot(place)

    @classmethod
    def _open_place(cls, place: Place) -> "Weights":
        path = Path(os.path.expanduser(place.path))
        if path.exists():
            return cls._open_path(path)
        if place.path.startswith(("http://", "https://")):
            from pluribus.core.remote import open_url

            return open_url(place.path)
        if place.path.startswith("hf://") or _looks_like_repo(place.path):
            from pluribus.core.hub import open_repo

            return open_repo(place)
        if "://" in place.path:
            raise InputError(f"{place.path}: addresses that are read begin with http, https or hf")
        raise MissingError(f"{path}: no such file or folder.{beside(path)}")

    @classmethod
    def _open_path(cls, path: Path) -> "Weights":
        if path.is_file():
            opened = formats.read(path)
            return cls(
                opened.sources, label=str(path), aliases=opened.aliases, metadata=opened.metadata
            )
        if (path / "adapter_config.json").is_file():
            from pluribus.core.lowrank import open_adapter

            return open_adapter(path)

        def one(shard: str) -> formats.Opened:
            if not (path / shard).is_file():
                raise MissingError(f"{path / shard}: named by the index, but not there")
            return formats.read(path / shard)

        sources, aliases, metadata = join_shards(shard_names(path), one, str(path))
        return cls(sources, label=str(path), aliases=aliases, folder=path, metadata=metadata)

    @classmethod
    def of(cls, tensors: Mapping[str, Any], *, label: str = "state dict") -> "Weights":
        """View torch tensors or numpy arrays as weights, without copying contiguous ones.

        Tensors that share their memory are kept once and reachable under all their names.
        """
        return cls({name: _array_source(name, t) for name, t in tensors.items()}, label=label)

    # -- mapping ---------------------------------------------------------------------------------

    @property
    def spec(self) -> dict[str, TensorSpec]:
        """Element types and shapes by name, from headers alone; aliases are not repeated."""
        return {name: source.spec for name, source in self._sources.items()}

    def source(self, name: str) -> Source:
        """Return the lazy tensor called `name` (or aliased so). Raises KeyError with a guess."""
        found = self._sources.get(self.aliases.get(name, name))
        if found is None:
            raise KeyError(f"{self.label} has no tensor {name!r}." + nearest(name, self))
        return found

    def __getitem__(self, name: str) -> "Tensor":
        return to_torch(self.source(name))

    def __iter__(self) -> Iterator[str]:
        yield from self._sources
        yield from self.aliases

    def __len__(self) -> int:
        return len(self._sources) + len(self.aliases)

    def __contains__(self, name: object) -> bool:
        return name in self._sources or name in self.aliases

    def __repr__(self) -> str:
        size = sum(spec.size for spec in self.spec.values())
        return f"Weights({self.label!r}, {len(self)} tensors, {size / 1e6:.1f} M values)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, shared ones once."""
        return sum(spec.nbytes for spec in self.spec.values())

    # -- algebra ---------------------------------------------------------------------------------

    def select(self, keep: Callable[[str], bool]) -> "Weights":
        """Return the tensors whose name `keep` accepts."""
        kept = {name: source for name, source in self._sources.items() if keep(name)}
        aliases = {name: to for name, to in self.aliases.items() if keep(name)}
        for name, target in list(aliases.items()):
            if target not in kept:  # the name it is kept under went: this one takes its place
                kept[name] = self._sources[target]
                del aliases[name]
        return self._with(kept, aliases)

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Weights":
        """Apply an elementwise function of float32 values to every floating tensor, lazily."""
        return self._combine(change, [])

    def __add__(self, other: Mapping[str, Any]) -> "Weights":
        return self._combine(np.add, [Weights.open(other)])

    def __sub__(self, other: Mapping[str, Any]) -> "Weights":
        return self._combine(np.subtract, [Weights.open(other)])

    def __mul__(self, by: float) -> "Weights":
        return self._combine(lambda values: values * np.float32(by), [])

    __rmul__ = __mul__

    def __neg__(self) -> "Weights":
        return self._combine(np.negative, [])

    def _combine(self, change: Callable[..., np.ndarray], others: list["Weights"]) -> "Weights":
        out: dict[str, Source] = {}
        for name, source in self._sources.items():
            if not source.spec.kind.is_float:
                out[name] = source
                continue
            rest = []
            for other in others:
                if name not in other or other.source(name).spec.shape != source.spec.shape:
                    raise MismatchError(
                        f"{other.label} has no tensor {name!r} of shape {list(source.spec.shape)}"
                    )
                rest.append(other.source(name))
            out[name] = Elementwise(change, [source, *rest])
        return self._with(out, self.aliases)

    def _with(self, sources: Mapping[str, Source], aliases: Mapping[str, str]) -> "Weights":
        return Weights(sources, label=self.label, aliases=aliases, folder=self.folder)

    # -- saving ----------------------------------------------------------------------------------

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file under a temporary name and rename it into place.

        Shared tensors are written once; their other names stand in the file's metadata.
        """
        path = Path(path)
        specs = self.spec
        head, offsets = header_bytes(
            specs, {"format": "pt", **self.aliases, **self.metadata, **(metadata or {})}
        )
        part = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with part.open("wb") as file:
                file.write(head)
                for name, spec in specs.items():
                    assert file.tell() == offsets[name]
                    step = max(1, (1 << 22) // spec.kind.size)
                    for start in range(0, spec.size, step):
                        stop = min(start + step, spec.size)
                        file.write(self._sources[name].load(start, stop).data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def config(self) -> dict[str, Any]:
        """Return the model folder's config.json, or an empty mapping without one."""
        path = self.folder / "config.json" if self.folder else None
        if path is None or not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(found, dict):
            raise FormatError(f"{path}: not a configuration but {type(found).__name__}")
        return found


class Elementwise(Source):
    """A function of the float32 values of several sources, rounded to the first one's type."""

    def __init__(self, change: Callable[..., np.ndarray], parts: list[Source]) -> None:
        self.change, self.parts, self.spec = change, parts, parts[0].spec

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        wide = np.float64 if self.spec.dtype == "F64" else np.float32
        values = self.change(*(part.floats(start, stop, wide) for part in self.parts))
        out[...] = narrow(np.asarray(values, wide), self.spec.kind)


def beside(path: Path) -> str:
    """Return `" Did you mean 'x'?"` for what lies beside a path that isn't there, or nothing."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()])


def shard_names(folder: Path) -> dict[str, list[str]]:
    """Return the checkpoint files of a model folder, each with the names its index promises.

    Raises MissingError if there is none, FormatError if an index points outside the folder.
    """
    for index in INDEXES:
        if (folder / index).is_file():
            return parse_index((folder / index).read_bytes(), str(folder / index))
    for single in SINGLES:
        if (folder / single).is_file():
            return {single: []}
    for pattern in ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth"):
        found = sorted(entry.name for entry in folder.glob(pattern) if entry.is_file())
        if len(found) == 1:
            return {found[0]: []}
        if found:
            raise FormatError(
                f"{folder}: holds {len(found)} {pattern} files and no index "
                f"({listing(found)}); name one file, or add model.safetensors.index.json"
            )
    raise MissingError(
        f"{folder}: no checkpoint in it; looked for {', '.join([*INDEXES, *SINGLES])}, "
        "adapter_config.json, *.safetensors, *.gguf, *.bin, *.pt"
    )


def parse_index(text: bytes, where: str) -> dict[str, list[str]]:
    """Read a sharded checkpoint's index: shard name -> tensor names, in the index's order."""
    try:
        table = json.loads(text)["weight_map"]
        if not isinstance(table, dict):
            raise TypeError("weight_map is not a mapping")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{where}: not a checkpoint index ({error!r})") from None
    shards: dict[str, list[str]] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise FormatError(f"{where}: shard {shard!r} of {name!r} is not a plain file name")
        shards.setdefault(shard, []).append(name)
    return shards


def join_shards(
    shards: Mapping[str, list[str]], one: Callable[[str], formats.Opened], where: str
) -> tuple[dict[str, Source], dict[str, str], dict[str, str]]:
    """Open every shard with `one`; return sources, aliases and metadata of all.

    Raises FormatError if a shard lacks what the index promises, or two hold the same tensor.
    """
    sources: dict[str, Source] = {}
    aliases: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for shard, expected in shards.items():
        opened = one(shard)
        absent = [n for n in expected if n not in opened.sources and n not in opened.aliases]
        if absent:
            raise FormatError(
                f"{where}: the index says that {shard} holds {listing(absent)}, but it doesn't"
            )
        twice = [name for name in opened.sources if name in sources]
        if twice:
            raise FormatError(f"{where}: {listing(twice)} stand in more than one shard")
        sources |= opened.sources
        aliases |= opened.aliases
        metadata |= opened.metadata
    return sources, aliases, metadata


def to_torch(source: Source) -> "Tensor":
    """Read a whole source into a torch tensor of its own element type."""
    import torch

    spec = source.spec
    kind = getattr(torch, spec.kind.torch)
    if spec.size == 0:
        return torch.empty(spec.shape, dtype=kind)
    return torch.from_numpy(source.load()).view(kind).reshape(spec.shape)


def _array_source(name: str, tensor: Any) -> Source:
    if isinstance(tensor, Source):
        return tensor
    if isinstance(tensor, np.ndarray | np.generic):
        return ArraySource.of(tensor, dtype(str(tensor.dtype)).name)
    if not hasattr(tensor, "detach"):
        raise FormatError(f"{name!r} is {type(tensor).__name__}, not a tensor or array")
    import torch

    value = tensor.detach().cpu().contiguous()
    kind = dtype(str(value.dtype))
    # reshape(-1) before view: a 0-d tensor has no last axis to reinterpret.
    raw = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0, np.uint8)
    return ArraySource(raw, TensorSpec(kind.name, tuple(value.shape)), owner=value)


def carried_files(folder: Path) -> list[Path]:
    """Return a model folder's small files that go with its tensors: config, tokenizer, licence."""
    skip = {*INDEXES, "adapter_config.json", "pluribus.json"}
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_file()
        and entry.name not in skip
        and (entry.suffix in CARRIED or entry.name.upper().startswith(("LICENSE", "NOTICE")))
        and entry.stat().st_size < (1 << 28)
    )


def _looks_like_repo(text: str) -> bool:
    parts = text.removeprefix("hf://").split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "/", "~"))


def numpy_view(source: Source) -> np.ndarray:
    """Read a whole source into a numpy (or ml_dtypes) array of its own element type."""
    return source.load().view(numpy_dtype(source.spec.kind)).reshape(source.spec.shape)

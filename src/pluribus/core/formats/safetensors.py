"""safetensors files, read from the header alone and checked as strictly as the format asks.

Layout (safetensors 0.5, "Format"): 8 bytes little-endian header length N, N bytes of JSON, then one
buffer in which the tensors lie without holes or overlap.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from pluribus.core.dtypes import DTYPES
from pluribus.core.errors import FormatError, MissingError
from pluribus.core.formats import Opened
from pluribus.core.source import FileSlice, Source, TensorSpec, files

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
MAX_DIM = 1 << 48


def claims(path: Path) -> bool:
    """Files called *.safetensors."""
    return path.name.endswith(".safetensors")


def _no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in pairs:
        if key in out:
            raise FormatError(f"the header names {key!r} twice")
        out[key] = value
    return out


def _spec(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """Check one header entry; return its spec and byte range."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise FormatError(f"tensor {name!r} has unknown dtype {kind!r}")

    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_DIM

    if not isinstance(shape, list) or len(shape) > 64 or not all(whole(d) for d in shape):
        raise FormatError(f"tensor {name!r} has an impossible shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(whole(o) for o in offsets):
        raise FormatError(f"tensor {name!r} has impossible data_offsets {offsets!r:.80}")
    spec = TensorSpec(kind, tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise FormatError(
            f"tensor {name!r} is {spec}, which is {spec.nbytes} bytes, but its data_offsets "
            f"{offsets} hold {end - begin}"
        )
    return spec, begin, end


def parse(
    header: bytes, buffer: int, where: str
) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str]]:
    """Check a header against `buffer` bytes of data; return specs with offsets, and metadata.

    Raises FormatError naming `where` and the first thing that is wrong.
    """
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_no_twins)
        if not isinstance(table, dict):
            raise FormatError("the header is not a JSON object")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise FormatError("__metadata__ must map text to text")
        "".join([*table, *metadata]).encode()  # half a surrogate pair could be written nowhere
        found = {name: _spec(name, entry) for name, entry in table.items()}
        at = 0
        for name, (_, begin, end) in sorted(found.items(), key=lambda item: item[1][1:]):
            if begin != at:
                fault = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
                raise FormatError(f"tensor {name!r} at data_offsets [{begin}, {end}] {fault}")
            at = end
        if at != buffer:
            state = "truncated" if at > buffer else "longer than its header says"
            raise FormatError(
                f"the header describes {at} bytes of tensors, the file holds {buffer}: it is "
                f"{state}; copy or download it again"
            )
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the header is not valid JSON ({error})") from None
    return {name: (spec, begin) for name, (spec, begin, _) in found.items()}, metadata


def header_length(first8: bytes, total: int, where: str) -> int:
    """Return the header's length from a file's first 8 bytes, or raise FormatError."""
    if len(first8) < 8:
        raise FormatError(f"{where}: {len(first8)} bytes is too short for a safetensors file")
    length = int.from_bytes(first8, "little")
    if length > MAX_HEADER or 8 + length > total:
        raise FormatError(
            f"{where}: claims a header of {length} bytes in a file of {total}; it is truncated or "
            "not a safetensors file"
        )
    return length


def opened(
    header: bytes,
    total: int,
    where: str,
    source: Callable[[int, TensorSpec], Source],
) -> Opened:
    """Build the sources of a file from its header; `source(offset, spec)` makes one."""
    found, metadata = parse(header, total - 8 - len(header), where)
    start = 8 + len(header)
    sources = {name: source(start + begin, spec) for name, (spec, begin) in found.items()}
    aliases = {k: v for k, v in metadata.items() if v in found and k not in found and k != "format"}
    return Opened(sources, metadata, aliases)


def read(path: Path) -> Opened:
    """Open a local file from its header; no tensor is read."""
    files.refresh(str(path))
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), total, str(path))
            header = file.read(length)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except OSError as error:
        raise MissingError(f"{path}: cannot be read ({error.strerror or error})") from None
    return opened(header, total, str(path), lambda at, spec: FileSlice(path, at, spec))


def header_bytes(
    specs: dict[str, TensorSpec], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Lay tensors out in order; return the file's head (length and JSON) and absolute offsets.

    The head is padded with spaces so that the data starts at a multiple of 64 bytes. Raises
    FormatError for a name that the format has no room for.
    """
    if "__metadata__" in specs:
        raise FormatError("a tensor called '__metadata__' cannot be stored as safetensors")
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    begins = {}
    for name, spec in specs.items():
        table[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        begins[name] = at
        at += spec.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}

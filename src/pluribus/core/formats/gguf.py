"""GGUF files (llama.cpp), versions 2 and 3, read from their header.

Layout (ggml docs/gguf.md): magic, version, tensor and metadata counts; metadata as key, type,
value; tensors as name, dimensions (fastest first: reversed here), type and offset; then the
aligned data.

F32, F16, BF16, F64 and whole numbers are read as they lie. Quantised tensors are F32 whose blocks
are expanded when they are read (package `gguf`). A file whose architecture is in `ARCHITECTURES`
gets Hugging Face names and layout: llama.cpp's rotary permutation of q and k (llama) is undone, and
the 1 it adds to norms (gemma) taken off. `rope_freqs.weight` is left out then, as it follows from
the model's configuration. Any other file keeps its own names.
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pluribus.core.errors import FormatError, MissingError, need
from pluribus.core.formats import Opened
from pluribus.core.source import FileSlice, Source, TensorSpec, files, read_exactly, stamp

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma")
MAX_DIM = 1 << 48
MAX_TEXT = 1 << 24  # bytes of one name or value
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}


class Packing(NamedTuple):
    """A quantised type: elements and bytes of one block."""

    name: str
    elements: int
    nbytes: int


PACKED = {
    2: Packing("Q4_0", 32, 18),
    3: Packing("Q4_1", 32, 20),
    6: Packing("Q5_0", 32, 22),
    7: Packing("Q5_1", 32, 24),
    8: Packing("Q8_0", 32, 34),
    10: Packing("Q2_K", 256, 84),
    11: Packing("Q3_K", 256, 110),
    12: Packing("Q4_K", 256, 144),
    13: Packing("Q5_K", 256, 176),
    14: Packing("Q6_K", 256, 210),
}
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_DERIVED = "rope_freqs.weight"


def claims(path: Path) -> bool:
    """Files called *.gguf, and *.bin files that start like one."""
    if path.suffix != ".bin":
        return path.suffix == ".gguf"
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


class PackedSlice(Source):
    """A quantised tensor, expanded to float32 block by block as it is read."""

    def __init__(self, path: Path, offset: int, spec: TensorSpec, packing: Packing) -> None:
        self.path, self.offset, self.spec, self.packing = str(path), offset, spec, packing

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`. Raises ExtraError if the package `gguf` is missing."""
        if stop <= start:
            return
        try:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError:
            raise need("gguf", "gguf", f"expanding {self.packing.name} tensors") from None
        _, size, nbytes = self.packing
        first, last = start // size, -(-stop // size)
        raw = np.empty((last - first) * nbytes, np.uint8)
        read_exactly(self.path, self.offset + first * nbytes, raw)
        with np.errstate(all="ignore"):  # a damaged scale may be infinite: the reader's to judge
            values = dequantize(raw[None], GGMLQuantizationType[self.packing.name]).reshape(-1)
        chosen = values[start - first * size : stop - first * size]
        out[...] = np.ascontiguousarray(chosen, np.float32).view(np.uint8)

    @property
    def identity(self) -> Any:
        """Path, offset and spec."""
        return (self.path, self.offset, self.spec)

    @property
    def fingerprint(self) -> str:
        """Path, size and time of the file, and the offset in it."""
        return f"{stamp(self.path)}:{self.offset}"


class RotaryRows(Source):
    """Rows of each head put back from (pair, half) to (half, pair), as Hugging Face has them."""

    def __init__(self, inner: Source, heads: int) -> None:
        self.inner, self.spec = inner, inner.spec
        self.size = inner.spec.shape[0] // heads  # rows of one head
        self.cols = max(math.prod(inner.spec.shape[1:]), 1)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        item = self.spec.kind.size
        done = 0
        while start < stop:
            row, col = divmod(start, self.cols)
            head, place = divmod(row, self.size)
            half, pair = divmod(place, self.size // 2)
            count = min(self.cols - col, stop - start)
            at = (head * self.size + 2 * pair + half) * self.cols + col
            self.inner.read(at, at + count, out[done : done + count * item])
            start, done = start + count, done + count * item

    @property
    def fingerprint(self) -> str:
        """The inner tensor's."""
        return f"rotary {self.inner.fingerprint}"


class NormMinusOne(Source):
    """A gemma norm without the 1 that llama.cpp folds into it (a small tensor)."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.spec = inner, inner.spec

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        from pluribus.core.dtypes import narrow

        out[...] = narrow(self.inner.floats(start, stop) - np.float32(1), self.spec.kind)

    @property
    def fingerprint(self) -> str:
        """The inner tensor's."""
        return f"norm {self.inner.fingerprint}"


class _Header:
    """Takes values from the head of a file, never more than the file has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise FormatError(
                f"its header goes past the end of the file ({self.at + count} of {self.size} "
                "bytes); it is truncated: copy or download it again"
            )
        self.at += count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            self.take(count)
        self.at += count
        self.file.seek(count, os.SEEK_CUR)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        count = self.number("Q")
        if count > MAX_TEXT:
            raise FormatError(f"a text of {count} bytes in its header")
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError("text in its header is not UTF-8") from None

    def value(self, kind: int) -> str:
        """Return a value as text; an array is stepped over, and only its length told."""
        if kind in _SCALARS:
            if kind == 7:
                flag = self.number("B")
                if flag > 1:
                    raise FormatError(f"a truth value of {flag} in its header")
                return str(bool(flag))
            return str(self.number(_SCALARS[kind]))
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise FormatError(f"a value of the unknown type {kind} in its header")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _TEXT and count <= (self.size - self.at) // 8:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise FormatError(f"an array of {count} values of type {inner} in its header")
        return f"[{count} values]"


def _header(take: _Header) -> tuple[dict[str, str], dict[str, tuple[TensorSpec, int, int]], int]:
    """Return metadata, tensors (spec, type, offset in the data), and where the data start."""
    if take.take(4) != b"GGUF":
        raise FormatError("not a GGUF file (it does not start with GGUF)")
    version = take.number("I")
    if version not in (2, 3):
        more = "; it may be big-endian" if version & 0xFFFF == 0 else ""
        raise FormatError(f"GGUF version {version}; versions 2 and 3 are read{more}")
    tensors, pairs = take.number("Q"), take.number("Q")
    # The shortest tensor entry has 24 bytes, the shortest pair 13.
    if tensors > take.size // 24 or pairs > take.size // 13:
        raise FormatError(f"{tensors} tensors and {pairs} values in a file of {take.size} bytes")
    metadata: dict[str, str] = {}
    for _ in range(pairs):
        key = take.text()
        value = take.value(take.number("I"))
        if key in metadata:
            raise FormatError(f"its header has {key!r} twice")
        metadata[key] = value
    found: dict[str, tuple[TensorSpec, int, int]] = {}
    for _ in range(tensors):
        name = take.text()
        count = take.number("I")
        if count > 8:
            raise FormatError(f"tensor {name!r} has {count} dimensions")
        shape = tuple(take.number("Q") for _ in range(count))[::-1]
        kind, offset = take.number("I"), take.number("Q")
        if name in found:
            raise FormatError(f"tensor {name!r} is there twice")
        if any(not 0 <= d < MAX_DIM for d in (*shape, math.prod(shape))):
            raise FormatError(f"tensor {name!r} has an impossible shape {list(shape)}")
        if kind not in PLAIN and kind not in PACKED:
            known = [*PLAIN.values(), *(packing.name for packing in PACKED.values())]
            raise FormatError(f"tensor {name!r} has type {kind}; types read: {', '.join(known)}")
        found[name] = TensorSpec(PLAIN.get(kind, "F32"), shape), kind, offset
    alignment = metadata.get("general.alignment", "32")
    if not alignment.isdecimal() or not 8 <= int(alignment) <= 1 << 20 or int(alignment) % 8:
        raise FormatError(f"an alignment of {alignment}")
    start = -(-take.at // int(alignment)) * int(alignment)
    for name, (_, _, offset) in found.items():
        if offset % int(alignment):
            raise FormatError(f"tensor {name!r} at offset {offset} is not aligned to {alignment}")
    return metadata, found, start


def _nbytes(name: str, spec: TensorSpec, kind: int) -> int:
    if kind in PLAIN:
        return spec.nbytes
    _, size, nbytes = PACKED[kind]
    if spec.shape and spec.shape[-1] % size:
        raise FormatError(f"tensor {name!r} {list(spec.shape)} is not made of blocks of {size}")
    if not spec.shape:
        raise FormatError(f"tensor {name!r} is a single value, but quantised")
    return spec.size // size * nbytes


def read(path: Path) -> Opened:
    """Open a GGUF file from its header; no tensor is read.

    Raises FormatError saying what is wrong with it.
    """
    files.refresh(str(path))
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            metadata, found, start = _header(_Header(file, size))
        at = 0
        sources: dict[str, Source] = {}
        for name, (spec, kind, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            nbytes = _nbytes(name, spec, kind)
            if nbytes and offset < at:
                raise FormatError(f"tensor {name!r} overlaps the one before it")
            if start + offset + nbytes > size:
                raise FormatError(
                    f"tensor {name!r} ends at byte {start + offset + nbytes}, the file at {size}; "
                    "it is truncated: copy or download it again"
                )
            at = max(at, offset + nbytes)
        for name, (spec, kind, offset) in found.items():
            where = start + offset
            sources[name] = (
                FileSlice(path, where, spec)
                if kind in PLAIN
                else PackedSlice(path, where, spec, PACKED[kind])
            )
        return _translated(Opened(sources, metadata))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except OSError as error:
        raise MissingError(f"{path}: cannot be read ({error.strerror or error})") from None


def hf_names(opened: Opened) -> Mapping[str, str]:
    """Return GGUF name -> Hugging Face name, or nothing if a tensor or architecture is unknown.

    Covered: dense llama (and mistral, which GGUF calls llama), qwen2, qwen3, gemma (the first).
    """
    if opened.metadata.get("general.architecture") not in ARCHITECTURES:
        return {}
    names: dict[str, str] = {}
    for name in opened.sources:
        if name == _DERIVED:
            continue
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if name in _OUTER:
            names[name] = _OUTER[name]
        elif found and found[2] in _LAYER:
            names[name] = f"model.layers.{found[1]}.{_LAYER[found[2]]}.{found[3]}"
        else:
            return {}
    return names


def _translated(opened: Opened) -> Opened:
    names = hf_names(opened)
    if not names:
        return opened
    architecture = opened.metadata["general.architecture"]
    sources: dict[str, Source] = {}
    for name, target in names.items():
        source = opened.sources[name]
        if architecture == "llama" and ".attn_q." in name:
            source = RotaryRows(source, _heads(opened, source, "head_count"))
        elif architecture == "llama" and ".attn_k." in name:
            source = RotaryRows(source, _heads(opened, source, "head_count_kv"))
        elif architecture == "gemma" and name.endswith("_norm.weight"):
            source = NormMinusOne(source)
        sources[target] = source
    return opened._replace(sources=sources)


def _heads(opened: Opened, source: Source, key: str) -> int:
    """Return the number of heads that the rows of q or k are split into."""
    usual = opened.metadata.get("llama.attention.head_count", "")
    count = opened.metadata.get(f"llama.attention.{key}", usual)
    if not count.isdecimal() or not int(count) or not source.spec.shape:
        raise FormatError(f"llama.attention.{key} is {count!r}: q and k can't be put in order")
    if source.spec.shape[0] % (2 * int(count)):
        raise FormatError(f"{source.spec.shape[0]} rows of q or k for {count} heads")
    return int(count)

"""PyTorch's .bin/.pt/.pth files, read without running their pickle and without importing torch.

`torch.save` writes a zip of uncompressed records: NAME/data.pkl, a pickle of the structure in which
storages are named, and NAME/data/KEY, the bytes of each storage. The pickle is interpreted by a
small machine that knows plain containers, numbers and text, and calls by name from `CALLS`; it can
build nothing else. Tensors stay where they are in the file.
"""

import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pluribus.core.dtypes import DTYPES, DType, numpy_dtype
from pluribus.core.errors import FormatError, MissingError, listing
from pluribus.core.formats import Opened
from pluribus.core.recent import Recent
from pluribus.core.source import FileSlice, Source, TensorSpec, files

MAX_PICKLE = 32 << 20  # bytes of data.pkl: about a quarter of a million tensors
MAX_DIM = 1 << 48
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
ADVICE = "load it where you trust it and save it again as safetensors"
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "",
}
_DTYPES = {f"torch {kind.torch}": kind for kind in DTYPES.values()}
_views = Recent(128 << 20)  # strided views, laid out row-major


def claims(path: Path) -> bool:
    """Files called *.bin, *.pt or *.pth."""
    return path.suffix in (".bin", ".pt", ".pth")


class _Name(str):
    """A global that the pickle mentions, as "module name"; only ever compared."""


class _Record(NamedTuple):
    offset: int
    size: int


class _Storage(NamedTuple):
    key: str
    kind: DType | None  # None: untyped bytes
    count: int  # elements, or bytes if untyped


class _Tensor(NamedTuple):
    storage: _Storage
    kind: DType
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


class StridedSlice(Source):
    """A view of a storage whose elements do not lie row-major; laid out so when first read."""

    def __init__(
        self,
        path: Path,
        at: int,
        count: int,
        offset: int,
        stride: tuple[int, ...],
        spec: TensorSpec,
    ) -> None:
        self.storage = FileSlice(path, at, TensorSpec(spec.dtype, (count,)))
        self.offset, self.stride, self.spec = offset, stride, spec

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        (flat,) = _views.get(self, self._lay_out)
        size = self.spec.kind.size
        out[...] = flat[start * size : stop * size]

    def _lay_out(self) -> tuple[np.ndarray]:
        kind = self.spec.kind
        span = 1 + sum((d - 1) * s for d, s in zip(self.spec.shape, self.stride, strict=True))
        held = self.storage.load(self.offset, self.offset + span).view(numpy_dtype(kind))
        steps = [stride * kind.size for stride in self.stride]
        view = np.lib.stride_tricks.as_strided(held, self.spec.shape, steps, writeable=False)
        return (np.ascontiguousarray(view).reshape(-1).view(np.uint8),)

    @property
    def identity(self) -> Any:
        """The storage, and how it is strided."""
        return (self.storage.path, self.storage.offset, self.offset, self.stride, self.spec)

    @property
    def fingerprint(self) -> str:
        """The storage's, and how it is strided."""
        return f"{self.storage.fingerprint}:{self.offset}:{self.stride}"


# -- what the pickle may call --------------------------------------------------------------------


def _whole(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < MAX_DIM for value in values)


def _view(storage: Any, offset: Any, shape: Any, stride: Any, kind: DType | None = None) -> _Tensor:
    kind = kind or (storage.kind if isinstance(storage, _Storage) else None)
    plain = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if kind is None or not plain or len(shape) > 64 or not _whole(offset, *shape, *stride):
        raise FormatError("a tensor with an impossible storage, shape or stride")
    return _Tensor(storage, kind, offset, shape, stride)


def _tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _view(storage, offset, shape, stride)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, name: Any, *_: Any
) -> _Tensor:
    kind = _DTYPES.get(name) if isinstance(name, _Name) else None
    if kind is None:
        raise FormatError(f"a tensor of an unknown element type ({_told(name)})")
    return _view(storage, offset, shape, stride, kind)


def _parameter(data: Any, *_: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise FormatError("a parameter that is no tensor")
    return data


def _with_attributes(*args: Any) -> _Tensor:
    call, kind, inner, _ = args
    plain = ("torch Tensor", "torch.nn.parameter Parameter", "torch.nn.parameter Buffer")
    if not isinstance(kind, _Name) or kind not in plain:
        raise FormatError(f"a tensor of the class {_told(kind)}")
    built = _call(call, inner)
    if not isinstance(built, _Tensor):
        raise FormatError(f"a tensor made by {_told(call)}")
    return built


def _size(dims: Any = ()) -> tuple[Any, ...]:
    if not isinstance(dims, tuple | list):
        raise FormatError("a torch.Size that is no tuple")
    return tuple(dims)


CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: {},
    "torch Size": _size,
    "torch._utils _rebuild_tensor": _tensor_v2,
    "torch._utils _rebuild_tensor_v2": _tensor_v2,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._tensor _rebuild_from_type_v2": _with_attributes,
}
_KNOWN = {
    *CALLS,
    *_DTYPES,
    *(f"{module} {name}" for module in ("torch", "torch.storage") for name in _STORAGES),
    "torch Tensor",
    "torch.nn.parameter Parameter",
    "torch.nn.parameter Buffer",
    "torch device",
}


def _told(value: Any) -> str:
    """Name a global; of anything else only the type, as its text may be endless."""
    named = isinstance(value, _Name)
    return repr(value.replace(" ", ".")[:100]) if named else f"a {type(value).__name__}"


def _named(text: Any) -> _Name:
    if text not in _KNOWN:
        raise FormatError(
            f"its pickle asks for {_told(_Name(text))}, which a state dict does not need and which "
            f"is not run here; {ADVICE}"
        )
    return _Name(text)


def _call(name: Any, args: Any) -> Any:
    if not isinstance(name, _Name) or name not in CALLS or not isinstance(args, tuple):
        raise FormatError(f"its pickle calls {_told(name)}; {ADVICE}")
    return CALLS[name](*args)


def _storage(told: Any) -> _Storage:
    if not isinstance(told, tuple) or len(told) != 5 or told[0] != "storage":
        raise FormatError("it refers to something outside that is no storage")
    _, kind, key, _, count = told
    if not isinstance(kind, _Name) or not isinstance(key, str) or not _whole(count):
        raise FormatError("it names an impossible storage")
    found = _STORAGES.get(kind.split(" ")[1])
    if found is None:
        raise FormatError(f"it names a storage of the kind {kind!r}")
    return _Storage(key, DTYPES[found] if found else None, count)


class _Mark:
    """Where the items of a container start on the stack."""


_MARK = _Mark()
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING"),
    *("STRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}


def structure(pickled: bytes) -> Any:
    """Return what a pickle describes, with tensors as stand-ins; nothing of it is run.

    Raises FormatError for any call, class or opcode that a state dict does not need.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}  # not a list: a pickle may name any index

    def items() -> list[Any]:
        """Take what lies above the last mark."""
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError("no mark")
        taken = stack[at + 1 :]
        del stack[at:]
        return taken

    def put(target: Any, pairs: list[Any]) -> None:
        if type(target) is not dict or len(pairs) % 2:
            raise FormatError("its pickle fills something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise FormatError(f"a dictionary with a {type(key).__name__} as a key")
            target[key] = value

    def extend(target: Any, more: list[Any]) -> None:
        if type(target) is not list:
            raise FormatError("its pickle appends to something that is no list")
        target.extend(more)

    for opcode, arg, _ in pickletools.genops(pickled):
        op = opcode.name
        if op in _LITERALS:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op]())
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            if len(stack) < count:
                raise IndexError("stack too short")
            stack[-count:] = [tuple(stack[-count:])]
        elif op == "TUPLE":
            stack.append(tuple(items()))
        elif op == "LIST":
            stack.append(items())
        elif op == "DICT":
            made: dict[Any, Any] = {}
            put(made, items())
            stack.append(made)
        elif op == "APPEND":
            extend(stack[-2], [stack.pop()])
        elif op == "APPENDS":
            more = items()
            extend(stack[-1], more)
        elif op == "SETITEM":
            pair = [stack[-2], stack[-1]]
            del stack[-2:]
            put(stack[-1], pair)
        elif op == "SETITEMS":
            pairs = items()
            put(stack[-1], pairs)
        elif op == "ADDITEMS":
            items()  # sets are only ever metadata; their content is not needed
        elif op == "GLOBAL":
            stack.append(_named(arg))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if type(module) is not str or type(name) is not str:
                raise FormatError("its pickle asks for something without a name")
            stack.append(_named(f"{module} {name}"))
        elif op in ("REDUCE", "NEWOBJ"):
            args = stack.pop()
            stack.append(_call(stack.pop(), args))
        elif op == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif op == "BUILD":  # attributes of an OrderedDict: _metadata of a state dict
            stack.pop()
            if type(stack[-1]) is not dict:
                raise FormatError(f"its pickle sets attributes of an object; {ADVICE}")
        elif op == "STOP":
            return stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise FormatError(f"its pickle uses the opcode {op}; {ADVICE}")
    raise FormatError("its pickle has no end")


def state_dict(top: Any) -> dict[str, _Tensor]:
    """Return the tensors of a state dict, alone or in a training checkpoint that is unambiguous."""

    def plain(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and bool(value)
            and all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in value.items())
        )

    if plain(top) or top == {}:
        return top
    if not isinstance(top, dict):
        raise FormatError(f"it holds a {type(top).__name__.strip('_')}, not a state dict")
    keys = listing(
        [f"{str(key)[:50]!r} ({type(v).__name__.strip('_')})" for key, v in top.items()], 12
    )
    inner = [key for key, value in top.items() if plain(value)]
    if len(inner) == 1 and inner[0] in WRAPPERS:
        return top[inner[0]]
    raise FormatError(
        f"it is not a state dict, and it is not clear which part of it is; top-level keys: {keys}. "
        "Save the model's state dict alone, as safetensors"
    )


# -- the zip -------------------------------------------------------------------------------------


def _records(path: Path, size: int) -> dict[str, _Record]:
    """Return where each record's bytes lie; refuse what torch.save does not write."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        end = archive.start_dir
        if any("/code/" in n or n.endswith("/constants.pkl") for n in archive.namelist()):
            raise FormatError(f"a TorchScript archive, which carries code; {ADVICE}")
        found: dict[str, _Record] = {}
        for info in archive.infolist():
            name = info.filename
            if name in found:
                raise FormatError(f"record {name!r} is there twice")
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise FormatError(f"record {name!r} points outside the archive")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise FormatError(f"record {name!r} is compressed, which torch.save never does")
            if info.flag_bits & 1:
                raise FormatError(f"record {name!r} is encrypted")
            if info.header_offset < 0:
                raise FormatError(f"record {name!r} starts before the file")
            file.seek(info.header_offset)
            head = file.read(30)
            if len(head) < 30 or head[:4] != b"PK\x03\x04":
                raise FormatError(f"record {name!r} has no header where it should start")
            name_size, extra_size = struct.unpack("<HH", head[26:30])
            if file.read(name_size) != info.orig_filename.encode("utf-8"):
                raise FormatError(f"record {name!r} has another name in its own header")
            offset = info.header_offset + 30 + name_size + extra_size
            if offset + info.file_size > min(end, size):
                raise FormatError(f"record {name!r} goes past the end; the file is truncated")
            found[name] = _Record(offset, info.file_size)
    at = 0
    for name, record in sorted(found.items(), key=lambda item: item[1]):
        if record.offset < at:
            raise FormatError(f"record {name!r} overlaps the one before it")
        at = record.offset + record.size
    return found


def _root(found: Mapping[str, _Record]) -> str:
    pickles = [name for name in found if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise FormatError(f"a zip, but not one of torch.save: {len(pickles)} data.pkl in it")
    return pickles[0].removesuffix("data.pkl")


def read(path: Path) -> Opened:
    """Open a file written by torch.save; no tensor is read.

    Raises FormatError saying what was refused and what to do.
    """
    try:
        files.refresh(str(path))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(4)
            if first != b"PK\x03\x04":
                old = first[:1] == b"\x80" or first[1:3] == b"\x8a\x0a"
                what = "a pickle from before PyTorch 1.6" if old else "no file of torch.save"
                raise FormatError(f"{what} (it is not a zip); {ADVICE}")
        found = _records(path, size)
        root = _root(found)
        order = found.get(f"{root}byteorder")
        if order is not None and _bytes(path, order, 16) != b"little":
            raise FormatError(f"its numbers are not little-endian; {ADVICE}")
        tensors = state_dict(structure(_bytes(path, found[f"{root}data.pkl"], MAX_PICKLE)))
        return Opened(
            {name: _source(path, root, found, name, t) for name, t in tensors.items()}, {}
        )
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except PermissionError as error:
        raise MissingError(f"{path}: cannot be read ({error.strerror})") from None
    except (
        zipfile.BadZipFile, struct.error, ArithmeticError, LookupError, ValueError, TypeError,
        AttributeError, RuntimeError, EOFError, OSError,
    ) as error:  # fmt: skip
        raise FormatError(
            f"{path}: damaged, or not a file of torch.save ({error!r:.200}); copy or download it "
            "again"
        ) from None


def _bytes(path: Path, record: _Record, most: int) -> bytes:
    if record.size > most:
        raise FormatError(f"its description takes {record.size} bytes; at most {most} are read")
    with path.open("rb") as file:
        file.seek(record.offset)
        return file.read(record.size)


def _source(
    path: Path, root: str, found: Mapping[str, _Record], name: str, tensor: _Tensor
) -> Source:
    storage, kind = tensor.storage, tensor.kind
    spec = TensorSpec(kind.name, tensor.shape)
    record = found.get(f"{root}data/{storage.key}")
    if record is None:
        raise FormatError(f"tensor {name!r} lies in the storage {storage.key!r}, which is missing")
    told = storage.count * (storage.kind.size if storage.kind else 1)
    if told != record.size:
        raise FormatError(
            f"storage {storage.key!r} of {name!r} should be {told} bytes, its record has "
            f"{record.size}"
        )
    count = record.size // kind.size
    last = tensor.offset + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True)
    )
    if spec.size and last >= count:
        raise FormatError(f"tensor {name!r} ({spec}) goes past its storage of {count} elements")
    if not spec.size or tensor.contiguous:
        return FileSlice(path, record.offset + tensor.offset * kind.size, spec)
    repeats = any(
        size > 1 and not step for size, step in zip(tensor.shape, tensor.stride, strict=True)
    )
    if repeats or spec.size > count:
        raise FormatError(f"tensor {name!r} repeats its elements (expand); save a contiguous copy")
    return StridedSlice(path, record.offset, count, tensor.offset, tensor.stride, spec)

"""Element types as safetensors spells them, and exact conversion to and from working precision.

Widening is exact for every type here. Narrowing rounds once, to nearest, ties to even, as IEEE 754
and PyTorch do; values beyond the range of the narrow type become infinite (or NaN for the 8-bit
types that have no infinity), as in PyTorch.
"""

from typing import NamedTuple

import numpy as np

from pluribus.core.errors import FormatError, nearest


class DType(NamedTuple):
    """One element type: safetensors name, bytes per element, and whether it is floating point."""

    name: str
    size: int
    is_float: bool
    torch: str  # attribute of the torch module
    numpy: str  # numpy or ml_dtypes name of the raw representation


_ALL = [
    DType("F64", 8, True, "float64", "float64"),
    DType("F32", 4, True, "float32", "float32"),
    DType("F16", 2, True, "float16", "float16"),
    DType("BF16", 2, True, "bfloat16", "bfloat16"),
    DType("F8_E4M3", 1, True, "float8_e4m3fn", "float8_e4m3fn"),
    DType("F8_E5M2", 1, True, "float8_e5m2", "float8_e5m2"),
    DType("I64", 8, False, "int64", "int64"),
    DType("I32", 4, False, "int32", "int32"),
    DType("I16", 2, False, "int16", "int16"),
    DType("I8", 1, False, "int8", "int8"),
    DType("U64", 8, False, "uint64", "uint64"),
    DType("U32", 4, False, "uint32", "uint32"),
    DType("U16", 2, False, "uint16", "uint16"),
    DType("U8", 1, False, "uint8", "uint8"),
    DType("BOOL", 1, False, "bool", "bool"),
]
DTYPES: dict[str, DType] = {d.name: d for d in _ALL}
_BY_ALIAS = {d.torch: d for d in _ALL} | {d.name.lower(): d for d in _ALL}
_BY_ALIAS |= {"bf16": DTYPES["BF16"], "fp16": DTYPES["F16"], "fp32": DTYPES["F32"]}
_BY_ALIAS |= {"half": DTYPES["F16"], "float": DTYPES["F32"], "double": DTYPES["F64"]}


def dtype(name: str) -> DType:
    """Return the element type called `name` in safetensors', torch's or short spelling.

    Raises FormatError for a name that none of them knows.
    """
    found = DTYPES.get(name) or _BY_ALIAS.get(str(name).removeprefix("torch.").lower())
    if found is None:
        raise FormatError(
            f"unknown element type {name!r}; known: {', '.join(DTYPES)}."
            + nearest(str(name), [*DTYPES, *_BY_ALIAS])
        )
    return found


def numpy_dtype(kind: DType) -> np.dtype:
    """Return numpy's (or ml_dtypes') type object for `kind`."""
    if kind.name in ("BF16", "F8_E4M3", "F8_E5M2"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, kind.numpy))
    return np.dtype(kind.numpy)


def widen(raw: np.ndarray, kind: DType, out: np.ndarray) -> bool:
    """Convert raw little-endian bytes of `kind` into `out` (float32 or float64), exactly.

    Returns False if any value is NaN or infinite.
    """
    if kind.name == "BF16" and out.dtype == np.float32:
        from pluribus.kernels.convert import bf16_to_f32

        return bool(bf16_to_f32(raw.view(np.uint16), out.view(np.uint32)))
    out[...] = raw.view(numpy_dtype(kind))
    return not kind.is_float or all_finite(out)


def first_nonfinite(rows: np.ndarray) -> int | None:
    """Return the first row of bf16 bit patterns (uint16, 2-D) with NaN or infinity, if any."""
    from pluribus.kernels.convert import first_nonfinite_bf16

    found = int(first_nonfinite_bf16(rows))
    return None if found < 0 else found


def all_finite(values: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite (float32 in one fused pass)."""
    if values.dtype == np.float32 and values.flags.c_contiguous:
        from pluribus.kernels.convert import finite_f32

        return bool(finite_f32(values.reshape(-1).view(np.uint32)))
    return bool(np.isfinite(values).all())


def narrow(values: np.ndarray, kind: DType) -> np.ndarray:
    """Round float32 or float64 `values` to `kind` once; return the raw bytes (uint8)."""
    if kind.name == "BF16" and values.dtype == np.float32:
        from pluribus.kernels.convert import f32_to_bf16

        out = np.empty(values.size, np.uint16)
        f32_to_bf16(np.ascontiguousarray(values).reshape(-1).view(np.uint32), out)
        return out.view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values.astype(numpy_dtype(kind))).reshape(-1).view(np.uint8)

"""Chunks that stay in the first cache: how kernels load their inputs and store their results.

A block is float32, or the bit patterns of bfloat16 as uint16, straight from the file: then every
chunk is widened as it is loaded and rounded as it is stored, and no float32 copy of a block ever
travels through memory.

What keeps a loop from vectorising, all measured: an index other than the loop's own variable (numba
looks for a negative one; take a slice and start at 0), `&` between conditions (they become 64-bit
numbers), sums of uint32 that are not cast back at each step (likewise), and a division that may
raise.
"""

from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys
from numba.extending import overload

CHUNK = 1024  # elements


class Stored(FunctionCache):
    """Compiled functions on disk, loaded without what only a compiler needs.

    Numba's own cache first registers everything that it can compile, which takes four times as long
    as the rest of a start. Compiling, where that is due, registers it all the same.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return what was compiled for a signature, or None."""
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a kernel: without the GIL, stored on disk, and without the Python error model.

    That model's test of every divisor would keep loops from vectorising.
    """
    compiled: Any = nb.njit(nogil=True, error_model="numpy", **options)(function)
    compiled._cache = Stored(function)
    return compiled


_EXP = np.uint32(0x7F800000)
_SIGN_OFF = np.uint32(0x7FFFFFFF)


@jit
def rounded(bits: Any) -> Any:
    """Return a float32 bit pattern rounded to bf16, to nearest, ties to even; NaN stays NaN."""
    half = np.uint32(bits >> np.uint32(16))
    odd = np.uint32(half & np.uint32(1))
    up = np.uint32(np.uint32(bits + np.uint32(odd + np.uint32(0x7FFF))) >> np.uint32(16))
    quiet = np.uint32(half | np.uint32(0x40))
    return np.uint16(quiet if np.uint32(bits & _SIGN_OFF) > _EXP else up)


def wide(value: Any) -> Any:
    """Return one element of a block as float32 (compiled code only)."""
    raise NotImplementedError("for compiled kernels")


def store(values: Any, out: Any) -> None:
    """Round a chunk of float32 to the type of `out`, as `core.dtypes.narrow` does (likewise)."""
    raise NotImplementedError("for compiled kernels")


@overload(wide, jit_options={"error_model": "numpy"})
def _wide(value: Any) -> Callable[..., Any]:
    def bf16(value: Any) -> Any:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    def f32(value: Any) -> Any:
        return value

    return bf16 if value == nb.uint16 else f32


@overload(store, jit_options={"error_model": "numpy"})
def _store(values: Any, out: Any) -> Callable[..., None]:
    def bf16(values: Any, out: Any) -> None:
        bits = values.view(np.uint32)
        for i in range(out.size):
            out[i] = rounded(bits[i])

    def f32(values: Any, out: Any) -> None:
        for i in range(out.size):
            out[i] = values[i]

    return bf16 if out.dtype == nb.uint16 else f32


@jit
def load(raw: Any, out: Any) -> None:
    """Fill `out` with a chunk as float32."""
    for i in range(out.size):
        out[i] = wide(raw[i])


@jit
def load_update(base: Any, raw: Any, out: Any) -> None:
    """Fill `out` with a chunk of raw - base; `base` is float32 already."""
    for i in range(out.size):
        out[i] = wide(raw[i]) - base[i]


def space(base: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Return where a merged block goes: `out`, or a new float32 array of the base's shape."""
    return np.empty(base.shape, np.float32) if out is None else out

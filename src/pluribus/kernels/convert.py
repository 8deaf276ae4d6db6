"""bfloat16 to float32 and back, and the finite check, each in one pass."""

import numba as nb
import numpy as np

_EXP = np.uint32(0x7F800000)
_SIGN_OFF = np.uint32(0x7FFFFFFF)


@nb.njit(nogil=True, cache=True)
def bf16_to_f32(raw, out):
    """Widen bf16 bit patterns into float32 bit patterns; return 1 if all are finite."""
    bad = np.uint32(0)
    for i in range(raw.size):
        bits = np.uint32(np.uint32(raw[i]) << np.uint32(16))
        out[i] = bits
        bad |= np.uint32((bits & _EXP) == _EXP)
    return bad == np.uint32(0)


@nb.njit(nogil=True, cache=True)
def finite_f32(bits):
    """Return 1 if no float32 bit pattern is NaN or infinite."""
    bad = np.uint32(0)
    for i in range(bits.size):
        bad |= np.uint32((bits[i] & _EXP) == _EXP)
    return bad == np.uint32(0)


@nb.njit(nogil=True, cache=True)
def f32_to_bf16(bits, out):
    """Round float32 bit patterns to bf16, to nearest, ties to even; NaN stays NaN."""
    for i in range(bits.size):
        u = bits[i]
        rounded = np.uint32(
            (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        )
        nan = (u & _SIGN_OFF) > _EXP
        quiet = np.uint32((u >> np.uint32(16)) | np.uint32(0x40))
        out[i] = np.uint16(quiet if nan else rounded)

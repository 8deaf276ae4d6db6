"""bfloat16 to float32 and back, and the finite check, each in one pass."""

import numpy as np

from pluribus.kernels.chunks import jit, rounded

_EXP = np.uint32(0x7F800000)


@jit
def bf16_to_f32(raw, out):
    """Widen bf16 bit patterns into float32 bit patterns; return 1 if all are finite."""
    bad = np.uint32(0)
    for i in range(raw.size):
        bits = np.uint32(np.uint32(raw[i]) << np.uint32(16))
        out[i] = bits
        bad |= np.uint32(np.uint32(bits & _EXP) == _EXP)
    return bad == np.uint32(0)


@jit
def _most(raw):
    most = np.uint16(0)
    for i in range(raw.size):
        exponent = np.uint16(raw[i] & np.uint16(0x7F80))
        most = exponent if exponent > most else most
    return most


@jit
def first_nonfinite_bf16(rows):
    """Return the number of the first row of bf16 bit patterns with NaN or infinity, else -1."""
    for j in range(rows.shape[0]):
        if _most(rows[j]) == np.uint16(0x7F80):
            return j
    return -1


@jit
def finite_f32(bits):
    """Return 1 if no float32 bit pattern is NaN or infinite."""
    bad = np.uint32(0)
    for i in range(bits.size):
        bad |= np.uint32(np.uint32(bits[i] & _EXP) == _EXP)
    return bad == np.uint32(0)


@jit
def f32_to_bf16(bits, out):
    """Round float32 bit patterns to bf16, to nearest, ties to even; NaN stays NaN."""
    for i in range(bits.size):
        out[i] = rounded(bits[i])

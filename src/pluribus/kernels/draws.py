"""Counter-based random numbers in compiled code: see `pluribus.core.random`."""

import numpy as np

from pluribus.kernels.chunks import jit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@jit
def scramble(z):
    """Return 24 random bits for a counter of a stream that has been multiplied out."""
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return np.uint32((z ^ (z >> np.uint64(31))) >> np.uint64(40))


@jit
def numbers(stream, start, out):
    """Fill `out` (uint32) with the numbers from `start` on, whole ones below 2^24."""
    first = stream + (start + np.uint64(1)) * _GOLDEN
    for i in range(out.size):
        out[i] = scramble(first + np.uint64(i) * _GOLDEN)


@jit
def number(stream, index):
    """Return number `index` of a stream as a whole number below 2^24."""
    return scramble(stream + (index + np.uint64(1)) * _GOLDEN)


@jit
def uniform(start, stream, out):
    """Fill `out` with the numbers from `start` on, uniform in [0, 1)."""
    first = stream + (start + np.uint64(1)) * _GOLDEN
    for i in range(out.size):
        out[i] = np.float32(scramble(first + np.uint64(i) * _GOLDEN)) * np.float32(2.0**-24)

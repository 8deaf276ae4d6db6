"""Random numbers that depend on what they are for, never on when or where they are drawn.

SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the i-th number of a stream mixes key + i·golden, so
any element of any tensor can be drawn alone, and threads, block sizes, sharding and devices
give the same bits. The key is a hash of seed, tensor name and stream.
"""

import numpy as np
import xxhash

from pluribus.core.arrays import Array, is_torch
from pluribus.core.merger import At

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def key(seed: int, name: str, stream: int | str) -> int:
    """Return the 64-bit key of a stream of random numbers."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{name}\0{stream}".encode())


def uniform(at: At, stream: int | str, like: Array) -> Array:
    """Draw one uniform number in [0, 1) for each element of a block: (n,) float32.

    Element i of the tensor gets the same number whatever block it is read in.
    """
    stream_key = key(at.seed, at.name, stream)
    count = at.stop - at.start
    if not is_torch(like):
        from pluribus.kernels.draws import uniform as kernel

        out = np.empty(count, np.float32)
        kernel(np.uint64(at.start), np.uint64(stream_key), out)
        return out
    import torch

    def signed(value: int) -> int:
        return value - (1 << 64) if value >= 1 << 63 else value

    def shifted(z: "torch.Tensor", by: int) -> "torch.Tensor":
        return (z >> by) & ((1 << (64 - by)) - 1)

    z = torch.arange(at.start + 1, at.stop + 1, dtype=torch.int64, device=like.device)
    z = z * signed(_GOLDEN) + signed(stream_key)
    z = (z ^ shifted(z, 30)) * signed(_MIX1)
    z = (z ^ shifted(z, 27)) * signed(_MIX2)
    z = z ^ shifted(z, 31)
    return shifted(z, 40).to(torch.float32) * 2.0**-24

"""Task arithmetic in one pass over each chunk."""

from typing import Any

import numpy as np

from pluribus.core.arrays import per_expert
from pluribus.core.sparse import total_weight
from pluribus.kernels.chunks import CHUNK, jit, load, load_update, space
from pluribus.kernels.combine import finish


@jit
def _block(base, experts, weight, normalize, whole, scale, out):
    t, n = experts.shape
    one = np.float32(1)
    b = np.empty(CHUNK, np.float32)
    tau = np.empty((t, CHUNK), np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        load(base[start:stop], b[:m])
        for j in range(t):
            row = tau[j, :m]
            load_update(b[:m], experts[j, start:stop], row)
            w = weight[j]
            for i in range(m):
                row[i] = row[i] * w
        finish(b[:m], tau, 0, weight, False, normalize, whole, one, scale, out[start:stop])


def fused(
    merger: Any,
    base: np.ndarray,
    experts: np.ndarray,
    *,
    out: np.ndarray | None = None,
    **_: Any,
) -> np.ndarray:
    """See `pluribus.merge.task_arithmetic.TaskArithmetic`."""
    t = experts.shape[0]
    whole = total_weight(merger.weight, t) if merger.normalize else 1.0
    out = space(base, out)
    _block(
        base,
        experts,
        np.array(per_expert(merger.weight, t), np.float32),
        merger.normalize,
        np.float32(whole),
        np.float32(merger.scale),
        out,
    )
    return out

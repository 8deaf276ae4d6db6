"""Weighted sums in float32: the last pass of everything that is found in inner products."""

import numpy as np

from pluribus.kernels.chunks import CHUNK, jit, load, space, store


@jit
def _block(base, experts, lead, minus, add, weights, share, out):
    t, n = experts.shape
    b = np.empty(CHUNK, np.float32)
    row = np.empty(CHUNK, np.float32)
    total = np.empty(CHUNK, np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        m = stop - start
        if lead.size or minus or add:
            load(base[start:stop], b[:m])
        if lead.size:
            for i in range(m):
                total[i] = b[i] * lead[0]
        for j in range(t):
            load(experts[j, start:stop], row[:m])
            if minus:
                for i in range(m):
                    row[i] = row[i] - b[i]
            w = weights[j]
            if j == 0 and lead.size == 0:
                for i in range(m):
                    total[i] = row[i] * w
            else:
                for i in range(m):
                    total[i] += row[i] * w
        for s in range(share.size):
            for i in range(m):
                total[i] = total[i] * share[s]
        if add:
            for i in range(m):
                total[i] = b[i] + total[i]
        store(total[:m], out[start:stop])


def weighted(
    experts: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray | None,
    *,
    base: np.ndarray | None = None,
    lead: float | None = None,
    minus: bool = False,
    add: bool = False,
    then: tuple[float, ...] = (),
) -> np.ndarray:
    """Return [lead * base +] sum_t w_t x_t, times each of `then` in turn, [+ base].

    `experts` are (t, n) or any (t, ...), float32 or packed; `minus` takes the base off each, `add`
    adds it in the end.
    """
    flat = experts.reshape(experts.shape[0], -1)
    out = space(experts[0], out)
    _block(
        flat[0] if base is None else base.reshape(-1),
        flat,
        np.array([] if lead is None else [lead], np.float32),
        minus,
        add,
        np.asarray(weights, np.float32),
        np.array(then, np.float32),
        out.reshape(-1),
    )
    return out

"""values += scale * (B @ A), for any range of flattened elements, in one fixed order of sums."""

from pluribus.kernels.chunks import jit


@jit
def _four(row, w0, w1, w2, w3, a0, a1, a2, a3):
    for j in range(row.size):
        row[j] = (((row[j] + w0 * a0[j]) + w1 * a1[j]) + w2 * a2[j]) + w3 * a3[j]


@jit
def _one(row, w, a):
    for j in range(row.size):
        row[j] += w * a[j]


@jit
def add_low_rank(values, start, b, a, scale, scratch):
    """Add to `values` the elements from `start` on of scale * (B @ A), row-major.

    `b` (R, k) and `a` (k, c) share the type of `values`; `scratch` has room for c of them. Each
    element is summed over k upwards, so neither the range nor the machine changes a bit.
    """
    rank, cols = a.shape
    done = 0
    while done < values.size:
        i = (start + done) // cols
        f = start + done - i * cols
        e = min(cols, f + values.size - done)
        row = scratch[: e - f]
        row[:] = 0
        k = 0
        while k + 4 <= rank:  # four terms a pass over the row, still added one after another
            _four(
                row, b[i, k], b[i, k + 1], b[i, k + 2], b[i, k + 3],
                a[k, f:e], a[k + 1, f:e], a[k + 2, f:e], a[k + 3, f:e],
            )  # fmt: skip
            k += 4
        while k < rank:
            _one(row, b[i, k], a[k, f:e])
            k += 1
        _one(values[done : done + row.size], scale, row)
        done += row.size

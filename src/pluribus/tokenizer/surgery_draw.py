"""Random rows for new tokens: standard normal, or distributed like the rows a matrix has.

    z = sqrt(-2 ln(1 - u)) cos(2 pi u'),  u, u' uniform in [0, 1)        (d,), Box and Muller 1958
    row = mean(W) + L z,  L L^T = cov(W) = sum_i (W_i - mean)^T (W_i - mean) / n    W: (n, d)

The second is Hewitt, "Initializing new word embeddings for pretrained language models", 2021: new
tokens that are, on average, as likely as the old ones. A row depends on seed, matrix and token id
alone, whatever else is drawn.
"""

import numpy as np

from pluribus.core.merger import At
from pluribus.core.random import uniform
from pluribus.core.shapes import Float, Float32, Float64, Int64

BLOCK = 4096  # rows that are widened to float64 at a time


def normal(
    ids: Int64[np.ndarray, " m"], width: int, *, name: str, stream: str, seed: int
) -> Float32[np.ndarray, "m d"]:
    """Draw a standard normal row of `width` for each token id of the matrix `name`."""
    out = np.empty((len(ids), width), np.float32)
    for place, row in enumerate(ids.tolist()):
        at = At(name=name, start=row * width, stop=(row + 1) * width, seed=seed)
        radius = np.asarray(uniform(at, f"{stream}/radius", out))
        angle = np.asarray(uniform(at, f"{stream}/angle", out))
        out[place] = np.sqrt(-2 * np.log1p(-radius)) * np.cos(np.float32(2 * np.pi) * angle)
    return out


def spread(
    rows: Float[np.ndarray, "n d"],
) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, "d d"]]:
    """Return the mean of rows, and a root L of their covariance L L^T."""
    mean = rows.mean(0, dtype=np.float64)
    covariance = np.zeros((rows.shape[1], rows.shape[1]))
    for first in range(0, len(rows), BLOCK):
        centred = rows[first : first + BLOCK] - mean
        covariance += centred.T @ centred
    covariance /= len(rows)
    try:
        return mean, np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # fewer rows than columns, or constant ones
        values, vectors = np.linalg.eigh(covariance)
        return mean, vectors * np.sqrt(values.clip(min=0))

"""Spectra of task vectors: effective rank, stable rank, and how much their subspaces share.

For every matrix (r, c), convolutions as (r, everything else), with task matrices D_t = theta_t -
theta_0 and singular values s_t:

    effective rank  = exp(-sum_i p_i ln p_i),  p = s_t / sum(s_t)       Roy and Vetterli, EUSIPCO
                                                                        2007, section 2
    stable rank     = sum_i s_i^2 / max_i s_i^2
    angles (i, j)   = arccos of the singular values of U_i^T U_j        principal angles; Bjorck and
                                                                        Golub 1973
    overlap (i, j)  = mean of their squared cosines, over the smaller subspace

U_t are the leading singular vectors on the matrix's *shorter* side (of m = min(r, c) dimensions):
`rank` of them, or as many as hold the share `energy` of the squared norm. Two subspaces drawn at
random overlap in max(k_i, k_j) / m.

Everything comes from D D^T on the shorter side, summed over blocks in float64: singular values
below about 1e-8 of the largest are noise and count as 0. A tall matrix is read in blocks of rows, a
wide one whole, in float32. The cost is r c m per matrix and expert, and m^3: minutes for a model,
unlike the two passes of `inspect`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.pool import Pool
from pluribus.core.shapes import Float, Int
from pluribus.core.source import Source
from pluribus.engine.run import Progress

BLOCK = 1 << 20  # elements of a block of rows or columns
NOISE = 1e-15  # eigenvalues below this share of the largest, times m, are rounding


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One matrix of a pool with t experts; `side` is its shorter side, m long."""

    shape: tuple[int, int]
    values: Float[np.ndarray, "t m"]  # singular values, falling
    ranks: Int[np.ndarray, " t"]  # singular vectors in each subspace
    cosines: dict[tuple[int, int], Float[np.ndarray, " k"]]  # of principal angles, falling; i > j

    @property
    def side(self) -> int:
        """Length of the shorter side."""
        return min(self.shape)

    @property
    def effective_rank(self) -> Float[np.ndarray, " t"]:
        """Entropy of the normalised singular values, as a count; NaN for a task vector of zero."""
        return np.array([effective_rank(row) for row in self.values])

    @property
    def stable_rank(self) -> Float[np.ndarray, " t"]:
        """Squared norm over the largest squared singular value; NaN for zero."""
        first = self.values[:, 0] ** 2
        out = np.full(first.shape, np.nan)
        return np.divide((self.values**2).sum(1), first, out=out, where=first > 0)

    @property
    def overlap(self) -> Float[np.ndarray, "t t"]:
        """Mean squared cosine of the principal angles of each pair; NaN with a zero."""
        t = len(self.ranks)
        out = np.full((t, t), np.nan)
        for (i, j), cosines in self.cosines.items():
            out[i, j] = out[j, i] = float((cosines**2).mean())
        for i in range(t):
            out[i, i] = 1.0 if self.ranks[i] else np.nan
        return out

    @property
    def chance(self) -> float:
        """Overlap of two random subspaces of these dimensions."""
        return float(self.ranks.max()) / self.side

    def angles(self, i: int, j: int) -> Float[np.ndarray, " k"]:
        """Return the principal angles between two experts' subspaces in radians, rising."""
        found = self.cosines.get((max(i, j), min(i, j)))
        if found is None:
            raise InputError(f"there are no angles between expert {i} and {j}: one of them is zero")
        return np.arccos(np.clip(found, 0, 1))


@dataclass(frozen=True, eq=False)
class Spectra:
    """All matrices of a pool, in the model's order."""

    experts: tuple[str, ...]
    matrices: dict[str, Spectrum]
    rank: int | None
    energy: float | None
    seconds: float

    def mean(self, names: Sequence[str], of: str) -> np.ndarray:
        """Return the mean of a property of `Spectrum` over matrices, without those of zero."""
        rows = np.array([getattr(self.matrices[name], of) for name in names], float)
        known = ~np.isnan(rows)
        total, count = np.where(known, rows, 0).sum(0), known.sum(0)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures but the singular values, as plain values."""
        return {
            "rank": self.rank,
            "energy": self.energy,
            "seconds": round(self.seconds, 2),
            "matrices": {
                name: {
                    "shape": list(one.shape),
                    "subspace": one.ranks.tolist(),
                    "effective_rank": one.effective_rank.tolist(),
                    "stable_rank": one.stable_rank.tolist(),
                    "overlap": one.overlap.tolist(),
                    "chance": one.chance,
                    "angles": {
                        f"{self.experts[j]} – {self.experts[i]}": one.angles(i, j).tolist()
                        for i, j in one.cosines
                    },
                }
                for name, one in self.matrices.items()
            },
        }


def effective_rank(values: np.ndarray) -> float:
    """Return exp of the entropy of singular values divided by their sum; NaN if all are zero."""
    total = values.sum()
    if not total > 0:
        return float("nan")
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def spectra(
    pool: Pool,
    *,
    rank: int | None = 16,
    energy: float | None = None,
    threads: int | None = None,
    memory: int = 512 << 20,
    on_progress: Callable[[Progress], None] | None = None,
) -> Spectra:
    """Return the spectra of all floating matrices of a pool, and the overlap of their subspaces.

    Subspaces have `rank` dimensions, or with `energy` as many as hold that share of the squared
    norm. `memory` is a budget in bytes for a matrix in work. Raises InputError without a base, for
    a share or rank that means nothing, or a matrix that does not fit; NonFiniteError for NaN.
    """
    import time

    if pool.base is None:
        raise InputError("spectra compare experts with their base; give the base as well")
    if (rank is None) == (energy is None):
        raise InputError("give rank or energy: how many dimensions a subspace has, or holds")
    if rank is not None and rank < 1:
        raise InputError(f"rank = {rank}: give at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy = {energy}: give a share of the squared norm, above 0, at most 1")
    began = time.perf_counter()
    names = [name for name in pool.names if _is_matrix(pool.base.source(name))]
    total = sum(model.source(name).spec.nbytes for name in names for model in pool.models)
    told, done = Progress(0, total), 0
    found = {}
    workers = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as threaded:
        for name in names:
            base = pool.base.source(name)
            experts = [model.source(name) for model in pool.experts.values()]
            found[name] = _spectrum(
                name, base, experts, list(pool.experts), rank, energy, memory, workers, threaded
            )
            done += base.spec.nbytes + sum(expert.spec.nbytes for expert in experts)
            told.done = done
            if on_progress:
                on_progress(told)
    seconds = time.perf_counter() - began
    return Spectra(tuple(pool.experts), found, rank, energy, seconds)


def _is_matrix(source: Source) -> bool:
    shape = source.spec.shape
    return source.spec.kind.is_float and len(shape) >= 2 and min(_flat(shape)) >= 2


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    rows = shape[0]
    return rows, int(np.prod(shape[1:], dtype=np.int64))


def _spectrum(
    name: str,
    base: Source,
    experts: list[Source],
    labels: list[str],
    rank: int | None,
    energy: float | None,
    memory: int,
    workers: int,
    threaded: ThreadPoolExecutor,
) -> Spectrum:
    rows, columns = _flat(base.spec.shape)
    side = min(rows, columns)
    whole = 4 * rows * columns if rows <= columns else 0
    need = min(workers, len(experts)) * (4 * 8 * side * side + whole + 3 * 8 * BLOCK)
    if need > memory:
        raise InputError(
            f"tensor {name!r} ({base.spec}) needs {need / 1e6:.0f} MB for its spectrum, more than "
            f"the budget of {memory / 1e6:.0f} MB; give more memory or fewer threads"
        )

    def one(pair: tuple[str, Source]) -> tuple[np.ndarray, np.ndarray]:
        label, expert = pair
        gram = np.zeros((side, side))
        for block in _blocks(base, expert, rows, columns):
            if not np.isfinite(block).all():
                raise NonFiniteError(f"tensor {name!r} of {label} or of the base is not finite")
            gram += block @ block.T if rows <= columns else block.T @ block
        values, vectors = np.linalg.eigh(gram)
        values, vectors = values[::-1], vectors[:, ::-1]
        values = np.where(values > NOISE * side * max(values[0], 0), values, 0)
        return np.sqrt(values), vectors[:, : _dimensions(values, rank, energy)].copy()

    parts = list(threaded.map(one, zip(labels, experts, strict=True)))
    cosines = {}
    for i, (_, own) in enumerate(parts):
        for j in range(i):
            other = parts[j][1]
            if own.shape[1] and other.shape[1]:
                cosines[i, j] = np.linalg.svd(own.T @ other, compute_uv=False).clip(0, 1)
    ranks = np.array([own.shape[1] for _, own in parts])
    return Spectrum((rows, columns), np.stack([values for values, _ in parts]), ranks, cosines)


def _dimensions(squares: np.ndarray, rank: int | None, energy: float | None) -> int:
    """Return how many leading directions make a subspace, none of them of zero."""
    most = int((squares > 0).sum())
    if energy is None or not most:
        return min(rank or 0, most)
    held = np.cumsum(squares) / squares.sum()
    return min(int(np.searchsorted(held, energy * (1 - 1e-12))) + 1, most)


def _blocks(base: Source, expert: Source, rows: int, columns: int) -> Iterator[np.ndarray]:
    """Yield float64 pieces of the task matrix that make up the longer side."""
    if rows > columns:
        step = max(BLOCK // columns, 1)
        for start in range(0, rows, step):
            span = (start * columns, min(start + step, rows) * columns)
            yield _difference(base, expert, *span).reshape(-1, columns).astype(np.float64)
        return
    whole = np.empty((rows, columns), np.float32 if base.spec.dtype != "F64" else np.float64)
    step = max(BLOCK // columns, 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = _difference(base, expert, start * columns, stop * columns)
        whole[start:stop] = piece.reshape(-1, columns)
    width = max(BLOCK // rows, 1)
    for start in range(0, columns, width):
        yield whole[:, start : start + width].astype(np.float64)


def _difference(base: Source, expert: Source, start: int, stop: int) -> np.ndarray:
    wide = np.float64 if "F64" in (base.spec.dtype, expert.spec.dtype) else np.float32
    return expert.floats(start, stop, wide) - base.floats(start, stop, wide)

"""Aligned rows: a model's embedding matrix as the output vocabulary orders it, read lazily.

Each row is a row of some model's matrix, a mean of such rows, zero, or padding; a `RowMap` says
which. A block is filled from runs of consecutive source rows, so a matrix that is mostly in place
costs no more reads than the matrix itself.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from pluribus.core.dtypes import DTYPES, narrow
from pluribus.core.errors import MismatchError, listing
from pluribus.core.shapes import Float
from pluribus.core.source import Source, TensorSpec
from pluribus.core.weights import Weights
from pluribus.tokenizer import Kind, RowMap

_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|token_embedding"
    r"|shared|embedding)\.weight$"
)
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|output_projection|cls\.predictions\.decoder"
    r"|predictions\.decoder|lm_head\.decoder|proj_out)\.(weight|bias)$|(^|\.)predictions\.bias$"
)
ROWS_AT_ONCE = 256  # rows read together for the mean that padding rows get


@dataclass(frozen=True)
class Vocabulary:
    """Which of a model's tensors are indexed by tokens, and how many rows they have."""

    rows: int
    inputs: tuple[str, ...]  # input embeddings
    outputs: tuple[str, ...]  # heads and their biases

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.inputs + self.outputs


def vocabulary_of(weights: Weights) -> Vocabulary:
    """Find a model's token-indexed tensors by name and rows.

    Raises MismatchError if there is no input embedding, or several of different heights.
    """
    config = weights.config()
    told = {
        part["vocab_size"]
        for part in (config, *(v for v in config.values() if isinstance(v, dict)))
        if isinstance(part.get("vocab_size"), int)
    }
    specs = {name: weights.source(name).spec for name in weights}
    inputs = [n for n, spec in specs.items() if len(spec.shape) == 2 and _INPUT.search(n)]
    heights = {specs[name].shape[0] for name in inputs}
    if len(heights) > 1:
        agreed = heights & told
        if len(agreed) != 1:
            shown = listing([f"{name} {list(specs[name].shape)}" for name in inputs])
            raise MismatchError(
                f"{weights.label}: cannot tell which matrix belongs to the tokenizer: {shown}"
            )
        inputs = [name for name in inputs if specs[name].shape[0] in agreed]
        heights = agreed
    if not inputs:
        tall = [f"{n} {list(s.shape)}" for n, s in specs.items() if len(s.shape) == 2]
        raise MismatchError(
            f"{weights.label}: no input embedding was found among its matrices ({listing(tall)}), "
            "so its vocabulary cannot be aligned"
        )
    rows = heights.pop()
    outputs = [
        name
        for name, spec in specs.items()
        if spec.shape and spec.shape[0] in (rows, *told) and _OUTPUT.search(name)
    ]
    return Vocabulary(rows, tuple(inputs), tuple(outputs))


def is_vocabulary_name(name: str) -> bool:
    """Return whether a tensor's name is that of an embedding or a head."""
    return _INPUT.search(name) is not None or _OUTPUT.search(name) is not None


class AlignedRows(Source):
    """One model's matrix with the output's rows. `sources` are all models' matrices, in order."""

    def __init__(self, row_map: RowMap, sources: Sequence[Source]) -> None:
        used = {int(m) for m in np.unique(row_map.model) if m >= 0}
        used |= {m for owners in row_map.means.values() for m, _ in owners}
        shapes = {sources[m].spec.shape[1:] for m in used} or {sources[0].spec.shape[1:]}
        if len(shapes) > 1:
            raise MismatchError(
                f"embedding rows of different widths cannot be aligned: {sorted(shapes)}"
            )
        tail = shapes.pop()
        self.row_map, self.sources = row_map, tuple(sources)
        self.width = int(np.prod(tail, dtype=np.int64))
        kind = _promoted([sources[m].spec.dtype for m in sorted(used)] or [sources[0].spec.dtype])
        self.spec = TensorSpec(kind, (row_map.rows, *tail))
        self._padding: np.ndarray | None = None

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        size, width = self.spec.kind.size, self.width
        if start == stop:
            return
        out[...] = 0
        first, last = start // width, -(-stop // width)

        def put(row: int, raw: np.ndarray, skip: int = 0) -> None:
            """Store whole rows from `row` on, of which `skip` elements were left out."""
            at = (row * width + skip - start) * size
            out[at : at + raw.size] = raw

        for run in self.row_map.runs(first, last):
            begin = max(run.start * width, start)
            end = min(run.stop * width, stop)
            shift = (run.index - run.start) * width
            put(0, self._raw(self.sources[run.model], begin + shift, end + shift), begin)
        for row in range(first, last):
            kind = self.row_map.kind[row]
            if kind not in (Kind.MEAN, Kind.PAD):
                continue
            values = self._mean(row) if kind == Kind.MEAN else self._pad()
            begin, end = max(row * width, start), min((row + 1) * width, stop)
            put(0, narrow(values[begin - row * width : end - row * width], self.spec.kind), begin)

    def _raw(self, source: Source, start: int, stop: int) -> np.ndarray:
        if source.spec.dtype == self.spec.dtype:
            return source.load(start, stop)
        return narrow(source.floats(start, stop, self._wide), self.spec.kind)

    @property
    def _wide(self) -> type:
        return np.float64 if self.spec.dtype == "F64" else np.float32

    def _mean(self, row: int) -> Float[np.ndarray, " d"]:
        owners = self.row_map.means[row]
        total = np.zeros(self.width, self._wide)
        for model, index in owners:
            begin = index * self.width
            total += self.sources[model].floats(begin, begin + self.width, self._wide)
        return total / self._wide(len(owners))

    def _pad(self) -> Float[np.ndarray, " d"]:
        """Return the mean of all rows that are not padding, from one pass over them."""
        padding = self._padding
        if padding is None:
            total = np.zeros(self.width)
            count = 0
            for first in range(0, self.spec.shape[0], ROWS_AT_ONCE):
                last = min(first + ROWS_AT_ONCE, self.spec.shape[0])
                real = self.row_map.kind[first:last] != Kind.PAD
                block = np.zeros((last - first, self.width))
                for run in self.row_map.runs(first, last):
                    shift = (run.index - run.start) * self.width
                    begin, end = run.start * self.width, run.stop * self.width
                    values = self.sources[run.model].floats(begin + shift, end + shift, self._wide)
                    block[run.start - first : run.stop - first] = values.reshape(-1, self.width)
                for row in np.flatnonzero(self.row_map.kind[first:last] == Kind.MEAN):
                    block[row] = self._mean(first + int(row))
                total += block[real].sum(0)
                count += int(real.sum())
            padding = self._padding = (total / max(count, 1)).astype(self._wide)
        return padding

    @property
    def fingerprint(self) -> str:
        """Fingerprints of the matrices and a hash of the row map."""
        state = xxhash.xxh3_128()
        for array in (self.row_map.kind, self.row_map.model, self.row_map.index):
            state.update(np.ascontiguousarray(array).tobytes())
        state.update(repr(sorted(self.row_map.means.items())).encode())
        for source in self.sources:
            state.update(source.fingerprint.encode())
        return f"rows:{state.hexdigest()}"


class Rounded(Source):
    """A floating-point tensor rounded (or widened) to another element type as it is read."""

    def __init__(self, source: Source, kind: str) -> None:
        self.source, self.spec = source, TensorSpec(kind, source.spec.shape)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        kinds = (self.spec.dtype, self.source.spec.dtype)
        wide = np.float64 if "F64" in kinds else np.float32
        out[...] = narrow(self.source.floats(start, stop, wide), self.spec.kind)

    @property
    def fingerprint(self) -> str:
        """The source's, and the type."""
        return f"{self.spec.dtype}:{self.source.fingerprint}"


def _promoted(kinds: Sequence[str]) -> str:
    """Return the element type that holds values of all kinds: the same one, else a wide one."""
    unique = set(kinds)
    if len(unique) == 1:
        return kinds[0]
    widest = max(unique, key=lambda kind: DTYPES[kind].size)
    return widest if DTYPES[widest].size >= 4 else "F32"


def aligned(
    name: str,
    matrices: Sequence[Source],
    row_maps: Mapping[int, RowMap],
    position: int,
) -> Source:
    """Return one model's source of `name` with the output's rows; itself if nothing changes."""
    row_map = row_maps[position]
    own = matrices[position]
    if own.spec.shape[0] != row_map.rows_in:
        raise MismatchError(
            f"tensor {name!r} of {row_map.label} has {own.spec.shape[0]} rows, but the input "
            f"embedding has {row_map.rows_in}"
        )
    return own if row_map.is_identity else AlignedRows(row_map, matrices)


__all__: list[Any] = [
    "AlignedRows",
    "Rounded",
    "Vocabulary",
    "aligned",
    "is_vocabulary_name",
    "vocabulary_of",
]

"""Vocabulary alignment: for every model, how each row of its output-sized embedding is made.

Rows are matched by token string, never by position. The output vocabulary is that of one model, or
the union: the base's tokens with their ids, then the other models' ordinary tokens in user order
and id order, then their added tokens, then tokens a recipe names. A model's row for token k is

    its own row                      if it has k, unless k is forced
    the row the recipe names, or 0   if the recipe names one
    the base's row                   if the base has k
    the owner's row                  if exactly one model has k
    mean over owners of their rows   if several have k
    0, with a warning                if none has k

and rows beyond the vocabulary (`pad_to_multiple_of`) are the mean of the model's own aligned rows.
These are the rules of mergekit 0.1.5. It differs in three places: a token whose id lies beyond the
model's matrix makes it stop with a KeyError, here the token counts as absent; its order of new
ordinary tokens changes from run to run, here it is the id order of the model they come from; gaps
in the ids make it stop with an IndexError, here they become padding rows.

Nothing here reads a weight. `RowMap` is what a streaming reader follows block by block, and
`apply` is the slow, obvious version of that reader.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from pluribus.core.errors import listing
from pluribus.core.shapes import Int16, Int64, Shaped, UInt8
from pluribus.tokenizer.errors import TokenizerError


class Kind(IntEnum):
    """How a row is made; kinds up to OVERRIDE copy row `index` of model `model`."""

    OWN = 0  # the model's own row
    BASE = 1  # the base's row
    OWNER = 2  # the row of the only model that has the token
    OVERRIDE = 3  # the row a recipe names
    MEAN = 4  # mean of the rows listed in `means`
    ZERO = 5
    PAD = 6  # mean of this model's aligned rows that are not PAD


@dataclass(frozen=True)
class VocabIn:
    """One model's vocabulary: token strings to ids, and the rows its embedding matrix has."""

    label: str
    tokens: Mapping[str, int]
    rows: int
    added: tuple[str, ...] = ()  # added tokens in id order, special ones among them

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise TokenizerError(f"{self.label}: an embedding matrix with {self.rows} rows")
        strings: dict[int, str] = {}
        for token, index in self.tokens.items():
            if index < 0 or index in strings:
                twin = f" is also the id of {strings[index]!r}" if index in strings else ""
                raise TokenizerError(f"{self.label}: token {token!r} has id {index}{twin}")
            strings[index] = token

    def ordered(self) -> dict[str, int]:
        """Return the tokens that have a row, in id order."""
        pairs = sorted(self.tokens.items(), key=lambda pair: pair[1])
        return {token: index for token, index in pairs if index < self.rows}

    def beyond(self) -> list[str]:
        """Return the tokens whose id has no row, in id order."""
        out = [(index, token) for token, index in self.tokens.items() if index >= self.rows]
        return [token for _, token in sorted(out)]


@dataclass(frozen=True, kw_only=True)
class Fill:
    """The row a recipe names for a token; without a model it is zero."""

    model: int | None = None
    index: int | None = None
    force: bool = False  # also where a model has its own row


class Run(NamedTuple):
    """Output rows start..stop are rows index..index+(stop-start) of model `model`."""

    start: int
    stop: int
    model: int
    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class RowMap:
    """How the output-sized matrix of one model is made, row by row."""

    label: str
    kind: UInt8[np.ndarray, " v"]
    model: Int16[np.ndarray, " v"]  # -1 unless the row is a copy
    index: Int64[np.ndarray, " v"]  # -1 unless the row is a copy
    means: Mapping[int, tuple[tuple[int, int], ...]]  # row: (model, index) of each owner
    rows_in: int  # rows of the model's own matrix

    @property
    def rows(self) -> int:
        """Return the number of output rows."""
        return len(self.kind)

    @property
    def is_identity(self) -> bool:
        """Return whether the aligned matrix is the model's own, unchanged."""
        return (
            self.rows == self.rows_in
            and bool((self.kind == Kind.OWN).all())
            and bool((self.index == np.arange(self.rows)).all())
        )

    def runs(self, start: int = 0, stop: int | None = None) -> list[Run]:
        """Return the copied rows of a block as maximal runs of consecutive source rows."""
        stop = self.rows if stop is None else min(stop, self.rows)
        if start >= stop:
            return []
        copied = self.kind[start:stop] <= Kind.OVERRIDE
        model, index = self.model[start:stop], self.index[start:stop]
        joined = copied[1:] & copied[:-1] & (np.diff(model) == 0) & (np.diff(index) == 1)
        edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), stop - start]
        return [
            Run(start + a, start + b, int(model[a]), int(index[a]))
            for a, b in pairwise(edges)
            if copied[a]
        ]


@dataclass(frozen=True, kw_only=True)
class ModelRows:
    """Rows of one model's aligned matrix, counted by how they are made."""

    label: str
    tokens: int
    rows: int
    own: int
    base: int
    owner: int
    override: int
    mean: int
    zero: int
    pad: int
    dropped: int  # tokens of the model that the output lacks

    @property
    def substituted(self) -> int:
        """Return how many rows come from another model or from a recipe."""
        return self.base + self.owner + self.override + self.mean


@dataclass(frozen=True, kw_only=True)
class AlignmentReport:
    """What alignment does to each model, before a weight is read."""

    source: str
    tokens: int
    rows: int
    models: tuple[ModelRows, ...]
    warnings: tuple[str, ...]

    def table(self) -> list[str]:
        """Return the report as lines of text."""
        head = ["model", "tokens", "rows", "kept", "substituted", "zero", "padding", "dropped"]
        body = [
            [m.label, *map(str, (m.tokens, m.rows, m.own, m.substituted, m.zero, m.pad, m.dropped))]
            for m in self.models
        ]
        width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(
                [line[0].ljust(width[0])]
                + [c.rjust(w) for c, w in zip(line[1:], width[1:], strict=True)]
            )
            for line in [head, *body]
        ]
        total = f"output: {self.tokens} tokens, {self.rows} rows (tokenizer: {self.source})"
        return [*lines, total, *(f"warning: {text}" for text in self.warnings)]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        models = [{**vars(m), "substituted": m.substituted} for m in self.models]
        return {
            "source": self.source,
            "tokens": self.tokens,
            "rows": self.rows,
            "models": models,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """The output vocabulary, and one row map per model in user order."""

    tokens: Mapping[str, int]  # in id order
    rows: int
    maps: tuple[RowMap, ...]
    report: AlignmentReport
    source: Literal["union", "base", "model"]
    template: int | None  # model whose tokenizer the output starts from; None: the donor's
    added: tuple[str, ...] = field(default=())  # tokens a recipe adds that the vocabulary lacked

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of the report."""
        return self.report.warnings

    @property
    def is_identity(self) -> bool:
        """Return whether every model keeps its matrix as it is."""
        return all(m.is_identity for m in self.maps)


def align(
    models: Sequence[VocabIn],
    *,
    base: int | None = None,
    source: Literal["union", "base"] | int | VocabIn = "union",
    add: Sequence[str] = (),
    fills: Mapping[str, Fill] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Alignment:
    """Align vocabularies given in user order.

    Without a base the union starts from the first model and no row is taken from "the base".
    `source` is the union, the base (or first model), a model by position, or a vocabulary from
    outside the merge. Tokens in `add` join the output vocabulary; tokens in `fills` must be in it.
    Raises TokenizerError for positions out of range and for fills that name no output token.
    """
    if not models:
        raise TokenizerError("no vocabularies to align")
    for name, position in (("base", base), ("source", source)):
        if isinstance(position, int) and not 0 <= position < len(models):
            raise TokenizerError(f"{name} {position} is not one of the {len(models)} models")
    fills = fills or {}
    lead = 0 if base is None else base
    warnings = [_beyond_warning(m) for m in models if m.beyond()]

    if source == "union":
        tokens, template, kind = _union(models, lead), lead, "union"
    elif source == "base":
        tokens, template, kind = models[lead].ordered(), lead, "base"
    else:
        donor = source if isinstance(source, VocabIn) else models[source]
        tokens = dict(sorted(donor.tokens.items(), key=lambda pair: pair[1]))
        template = None if isinstance(source, VocabIn) else source
        kind = "model"
    if not tokens:
        raise TokenizerError("the output vocabulary is empty: its source has no tokens")
    added = _append(tokens, add)
    if lost := [token for token in fills if token not in tokens]:
        raise TokenizerError(f"no such token in the output vocabulary: {listing(map(repr, lost))}")

    rows = max(tokens.values()) + 1
    if gaps := rows - len(tokens):
        warnings.append(f"{gaps} ids below {rows} have no token: their rows are padding")
    if pad_to_multiple_of:
        rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of

    own = np.stack([_own_rows(m, tokens, rows) for m in models])  # (t, v), -1 where absent
    maps, nowhere = _row_maps(models, own, tokens, base, fills)
    if nowhere:
        warnings.append(
            f"{len(nowhere)} tokens are in no model and get zero rows: "
            f"{listing(map(repr, nowhere))}"
        )
    counts = tuple(_count(m, r, tokens) for m, r in zip(models, maps, strict=True))
    label = kind if kind != "model" else (donor.label)
    report = AlignmentReport(
        source=label, tokens=len(tokens), rows=rows, models=counts, warnings=tuple(warnings)
    )
    return Alignment(
        tokens=tokens,
        rows=rows,
        maps=maps,
        report=report,
        source=kind,
        template=template,
        added=tuple(added),
    )


def apply(
    row_map: RowMap, matrices: Sequence[Shaped[np.ndarray, "_ ..."]]
) -> Shaped[np.ndarray, "v ..."]:
    """Make the aligned matrix of one model, one row at a time: the oracle for fast readers.

    `matrices` are all models' matrices in user order. Sums run in float32 or wider and the result
    has the promoted dtype of the inputs.
    """
    dtype = np.result_type(*matrices)
    wide = np.promote_types(dtype, np.float32)
    out = np.zeros((row_map.rows, *matrices[0].shape[1:]), dtype=wide)
    for row, kind in enumerate(row_map.kind):
        if kind <= Kind.OVERRIDE:
            out[row] = matrices[row_map.model[row]][row_map.index[row]]
        elif kind == Kind.MEAN:
            owners = row_map.means[row]
            out[row] = sum(matrices[m][i].astype(wide) for m, i in owners) / len(owners)
    pad = row_map.kind == Kind.PAD
    if pad.any():
        out[pad] = out[~pad].mean(axis=0)
    return out.astype(dtype)


def _append(tokens: dict[str, int], more: Sequence[str]) -> list[str]:
    """Give each new token the next id, in place, and return the new ones."""
    following = max(tokens.values(), default=-1) + 1
    new = []
    for token in more:
        if token not in tokens:
            tokens[token] = following + len(new)
            new.append(token)
    return new


def _union(models: Sequence[VocabIn], lead: int) -> dict[str, int]:
    order = [models[lead], *(m for i, m in enumerate(models) if i != lead)]
    vocabularies = [m.ordered() for m in order]
    added = {
        token: None
        for m, vocabulary in zip(order, vocabularies, strict=True)
        for token in m.added
        if token in vocabulary
    }
    tokens = dict(vocabularies[0])
    for vocabulary in vocabularies[1:]:
        _append(tokens, [token for token in vocabulary if token not in added])
    _append(tokens, list(added))
    return tokens


def _own_rows(model: VocabIn, tokens: Mapping[str, int], rows: int) -> Int64[np.ndarray, " v"]:
    out = np.full(rows, -1, dtype=np.int64)
    get = model.tokens.get
    ids = np.fromiter(tokens.values(), dtype=np.int64, count=len(tokens))
    own = np.fromiter((get(token, -1) for token in tokens), dtype=np.int64, count=len(tokens))
    own[own >= model.rows] = -1
    out[ids] = own
    return out


def _row_maps(
    models: Sequence[VocabIn],
    own: Int64[np.ndarray, "t v"],
    tokens: Mapping[str, int],
    base: int | None,
    fills: Mapping[str, Fill],
) -> tuple[tuple[RowMap, ...], list[str]]:
    """Return the row maps, and the tokens that no model has and no recipe fills."""
    present = own >= 0
    owners = present.sum(0)
    rows = own.shape[1]
    is_token = np.zeros(rows, dtype=bool)
    is_token[list(tokens.values())] = True

    # What a model without the token gets; the same for all models.
    kind = np.full(rows, Kind.MEAN, dtype=np.uint8)
    model = np.full(rows, -1, dtype=np.int16)
    only = owners == 1
    kind[only] = Kind.OWNER
    model[only] = present.argmax(0)[only]
    if base is not None:
        kind[present[base]] = Kind.BASE
        model[present[base]] = base
    index = np.where(model >= 0, own[model, np.arange(rows)], -1)
    kind[owners == 0] = Kind.ZERO
    kind[~is_token] = Kind.PAD

    forced = np.zeros(rows, dtype=bool)
    for token, fill in fills.items():
        row = tokens[token]
        forced[row] = fill.force
        if fill.model is None or fill.index is None:
            kind[row], model[row], index[row] = Kind.ZERO, -1, -1
            continue
        if not (0 <= fill.model < len(models) and 0 <= fill.index < models[fill.model].rows):
            raise TokenizerError(
                f"token {token!r}: row {fill.index} of model {fill.model} does not exist"
            )
        kind[row], model[row], index[row] = Kind.OVERRIDE, fill.model, fill.index

    means = {
        int(row): tuple((int(m), int(own[m, row])) for m in np.flatnonzero(present[:, row]))
        for row in np.flatnonzero((kind == Kind.MEAN) & (owners < len(models)))
    }
    maps = []
    for i, m in enumerate(models):
        keep = present[i] & ~forced
        maps.append(
            RowMap(
                label=m.label,
                kind=np.where(keep, np.uint8(Kind.OWN), kind),
                model=np.where(keep, np.int16(i), model),
                index=np.where(keep, own[i], index),
                means=means,
                rows_in=m.rows,
            )
        )
    nowhere = [
        token for token, row in tokens.items() if kind[row] == Kind.ZERO and token not in fills
    ]
    return tuple(maps), nowhere


def _count(model: VocabIn, row_map: RowMap, tokens: Mapping[str, int]) -> ModelRows:
    by_kind = {kind.name.lower(): int(np.count_nonzero(row_map.kind == kind)) for kind in Kind}
    dropped = sum(token not in tokens for token in model.tokens)
    return ModelRows(
        label=model.label,
        tokens=len(model.tokens),
        rows=model.rows,
        dropped=dropped,
        **by_kind,
    )


def _beyond_warning(model: VocabIn) -> str:
    beyond = model.beyond()
    return (
        f"{model.label}: {len(beyond)} tokens have ids beyond its {model.rows} rows and count as "
        f"absent: {listing(map(repr, beyond))}"
    )

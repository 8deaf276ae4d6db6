"""Transplant a donor's tokenizer into a model: new vocabulary matrices, everything else as it is.

    transplant("model/", "donor/", "out/", method="omp", k=64)

The vocabulary matrices of both models are held in memory as float32; all other tensors are
streamed. The output appears under its name when it is whole, and the same command again finds it
complete or goes on copying where it stopped.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import ValidationError

from pluribus.core.dtypes import narrow
from pluribus.core.errors import (
    FormatError,
    InputError,
    MismatchError,
    NonFiniteError,
    OutputError,
    nearest,
)
from pluribus.core.source import ArraySource, Source, TensorSpec
from pluribus.core.weights import Weights, carried_files
from pluribus.engine import provenance
from pluribus.engine.device import Uploader
from pluribus.engine.driver import Options, Result, check_options, execute, target_of
from pluribus.engine.plan import Job, Plan
from pluribus.engine.run import Progress
from pluribus.recipe.rows import Vocabulary, vocabulary_of
from pluribus.tokenizer.files import COPIED
from pluribus.tokenizer.surgery import MatrixReport, Surgery, rows_for
from pluribus.tokenizer.surgery_config import moved
from pluribus.tokenizer.surgery_match import (
    Lexicon,
    Matched,
    encoder,
    match,
    pieces_of,
    read_lexicon,
)

GENERATION = "generation_config.json"
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """What a transplant did."""

    tokens: int  # of the donor
    rows_before: int
    rows: int
    matrices: tuple[MatrixReport, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and text, for JSON."""
        return dataclasses.asdict(self)


def settings(**given: Any) -> Surgery:
    """Return the settings of a transplant. Raises InputError that names the bad one."""
    known = [field.name for field in dataclasses.fields(Surgery)]
    for name in given:
        if name not in known:
            raise InputError(f"a transplant has no setting {name!r}.{nearest(name, known)}")
    try:
        return Surgery(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InputError(f"{name} = {first['input']!r}: {first['msg'].lower()}") from None


def transplant(
    model: Any,
    donor: Any,
    out: str | os.PathLike[str],
    *,
    options: Options | None = None,
    device: str = "cpu",
    on_step: OnStep | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **how: Any,
) -> tuple[Result, SurgeryReport]:
    """Write `model` with the tokenizer of `donor` into the folder `out`.

    Keywords are those of `Surgery`: method, k, cosine, weighting, subword, byte_match,
    prefix_match, pad_to_multiple_of, noise, scale, seed. `device` is where rows are approximated,
    `on_step` is told (stage, done, total) of that. Raises PluribusError if a model lacks a
    tokenizer or an input embedding, or `out` exists.
    """
    asked = settings(**how)
    options = options or Options()
    check_options(options)
    if device != "cpu":
        Uploader(device)  # raises for a device that isn't there
    model, donor = Weights.open(model), Weights.open(donor)
    recipe = {"tokensurgeon": model.label, "donor": donor.label, **dataclasses.asdict(asked)}
    path = _checked_place(out, (model, donor), recipe, options)
    patient = _Side(model)
    giver = _Side(donor)
    tensors, reports, matched = _matrices(patient, giver, asked, device, on_step)
    files, notes = _files(patient, giver, len(matched.made))
    changed = Weights(
        {name: tensors[name] if name in tensors else model.source(name) for name in model.spec},
        aliases=model.aliases,
        label=model.label,
    )
    state = xxhash.xxh3_128(json.dumps(recipe, sort_keys=True).encode())
    for name in sorted(files):
        state.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    jobs = [
        Job(name, spec, None, None, (changed.source(name),), {}, None, (model.label,), index)
        for index, (name, spec) in enumerate(changed.spec.items())
    ]
    plan = Plan(
        tuple(jobs),
        aliases=changed.aliases,
        recipe=recipe,
        warnings=tuple(notes),
        files=state.hexdigest(),
    )
    result = execute(plan, path, options, on_progress, files)
    report = SurgeryReport(
        tokens=len(matched.tokens),
        rows_before=patient.vocabulary.rows,
        rows=len(matched.made),
        matrices=tuple(reports),
        warnings=tuple(notes),
    )
    return result, report


def _checked_place(
    out: str | os.PathLike[str],
    models: Sequence[Weights],
    recipe: Mapping[str, Any],
    options: Options,
) -> Path:
    """Return where to write. Raises OutputError at once if that will not be allowed at the end."""
    path = target_of(out)
    if path.name.endswith(".safetensors"):
        raise OutputError(f"{path}: name a folder, because a tokenizer goes with the tensors")
    for one in models:
        if one.folder is not None and path.exists() and path.samefile(one.folder):
            raise OutputError(
                f"{out}: {one.label} is read from there, and it would be replaced; choose another "
                "output"
            )
    if path.exists() and not options.overwrite:
        try:
            same = json.loads((path / provenance.NAME).read_bytes())["recipe"] == recipe
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not (same and options.resume):
            raise OutputError(
                f"{path}: exists already; choose another name, or pass --overwrite to replace it"
            )
    return path


class _Side:
    """One of the two models: its weights, vocabulary matrices and tokens."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        if weights.folder is None:
            raise InputError(
                f"{weights.label} is not a model folder, so it has no tokenizer; name a folder "
                "with config.json, tokenizer and checkpoint"
            )
        self.folder = weights.folder
        self.vocabulary: Vocabulary = vocabulary_of(weights)
        self.lexicon = read_lexicon(self.folder, label=weights.label, rows=self.vocabulary.rows)
        for name in self.vocabulary.names:
            if not weights.source(name).spec.kind.is_float:
                kind = weights.source(name).spec.dtype
                raise MismatchError(
                    f"{weights.label}: {name!r} is {kind}, and only floating-point embeddings can "
                    "be approximated"
                )

    def rows_of(self, name: str) -> Lexicon:
        """Return the tokens that have a row in one of the matrices."""
        rows = self.weights.source(name).spec.shape[0]
        vocab = replace(self.lexicon.vocab, rows=rows)
        return replace(self.lexicon, vocab=vocab)

    def values(self, name: str) -> np.ndarray:
        """Read a matrix or bias as float32, (v, d) or (v,)."""
        source = self.weights.source(name)
        values = source.floats().reshape(source.spec.shape)
        if not np.isfinite(values).all():
            raise NonFiniteError(f"{self.weights.label}: {name!r} holds NaN or infinity")
        return values

    @property
    def heads(self) -> list[str]:
        """Output matrices that are no other name of an input one."""
        inputs = {self.weights.aliases.get(name, name) for name in self.vocabulary.inputs}
        return [
            name
            for name in self.vocabulary.outputs
            if len(self.weights.source(name).spec.shape) == 2
            and self.weights.aliases.get(name, name) not in inputs
        ]

    @property
    def biases(self) -> list[str]:
        """Biases of the output."""
        names = self.vocabulary.outputs
        return [name for name in names if len(self.weights.source(name).spec.shape) == 1]

    @property
    def tied(self) -> bool:
        """Whether the configuration says that input and output are one matrix."""
        config = self.weights.config()
        parts = [config, *(value for value in config.values() if isinstance(value, dict))]
        return any(part.get("tie_word_embeddings") is True for part in parts)


def _matrices(
    model: _Side, donor: _Side, how: Surgery, device: str, on_step: OnStep | None
) -> tuple[dict[str, Source], list[MatrixReport], Matched]:
    """Return the new vocabulary matrices by name, how they were made, and the input's matching."""
    own = model.weights
    inputs = list(dict.fromkeys(own.aliases.get(name, name) for name in model.vocabulary.inputs))
    # A head that is stored apart but tied by the configuration is the input matrix on loading.
    heads = [] if model.tied else list(dict.fromkeys(own.aliases.get(n, n) for n in model.heads))
    donor_input = donor.vocabulary.inputs[0]
    donor_head = (donor.heads or [donor_input])[0] if not donor.tied else donor_input
    encode = encoder(model.folder) if how.method == "subword" else None
    out: dict[str, Source] = {}
    reports: list[MatrixReport] = []
    first: Matched | None = None
    bias_of = (heads or inputs)[0]
    for name in (*inputs, *heads):
        head = name in heads
        theirs = donor_head if head else donor_input
        lexicon = donor.rows_of(theirs)
        here = ("yes", "lm_head" if head else "embed")
        mine = model.rows_of(name)
        matched = match(
            mine,
            lexicon,
            byte=how.byte_match in here,
            prefix=how.prefix_match in here,
            pad_to_multiple_of=how.pad_to_multiple_of,
        )
        values = model.values(name)
        width = values.shape[1]
        # A logit is h.w + b: what combines the rows of w combines b.
        biases = model.biases if name == bias_of else []
        for bias in biases:
            if own.source(bias).spec.shape[0] != len(values):
                raise MismatchError(f"{own.label}: {bias!r} and {name!r} differ in rows")
            values = np.column_stack([values, model.values(bias)])
        told = (lambda done, total, name=name: on_step(name, done, total)) if on_step else None
        rows, report = rows_for(
            name,
            values,
            donor.values(theirs) if how.combines else np.empty((0, 0), np.float32),
            matched,
            how,
            head=head,
            pieces=pieces_of(mine, lexicon, encode) if encode else None,
            device=device,
            on_rows=told,
        )
        out[name] = _source(np.ascontiguousarray(rows[:, :width]), own.source(name).spec.dtype)
        for column, bias in enumerate(biases, width):
            kind = own.source(bias).spec.dtype
            out[bias] = _source(np.ascontiguousarray(rows[:, column]), kind)
        reports.append(report)
        first = first or matched
    for name in model.heads if model.tied else ():
        out[own.aliases.get(name, name)] = out[inputs[0]]
    assert first is not None
    return out, reports, first


def _source(values: np.ndarray, kind: str) -> Source:
    spec = TensorSpec(kind, values.shape)
    return ArraySource(narrow(values, spec.kind), spec)


def _files(model: _Side, donor: _Side, rows: int) -> tuple[dict[str, bytes], list[str]]:
    """Return the small files of the output: the model's own, the donor's tokenizer."""
    names = {p.relative_to(model.folder) for pattern in COPIED for p in model.folder.glob(pattern)}
    files = {
        path.name: path.read_bytes()
        for path in carried_files(model.folder)
        if path.relative_to(model.folder) not in names and path.name != "chat_template.json"
    }
    for pattern in COPIED:
        for path in sorted(donor.folder.glob(pattern)):
            files[path.relative_to(donor.folder).as_posix()] = path.read_bytes()
    theirs = donor.lexicon
    back = {index: token for token, index in model.lexicon.vocab.tokens.items()}

    def new_id(index: int) -> int | None:
        token = back.get(index)
        if token is None:
            return None
        return theirs.keys.get(model.lexicon.key(token), theirs.vocab.tokens.get(token))

    told = donor.weights.config()
    notes: list[str] = []
    for name in ("config.json", GENERATION):
        if name not in files:
            continue
        source = told | (_json(donor.folder / name) if name == GENERATION else {})
        config = _json(model.folder / name)
        changed, more = moved(config, source, rows, model.vocabulary.rows, new_id)
        notes += [f"{name}: {note}" for note in more]
        files[name] = (json.dumps(changed, indent=2) + "\n").encode()
    beyond = theirs.vocab.beyond()
    if beyond:
        notes.append(
            f"{donor.weights.label} has no row for {len(beyond)} of its tokens; those that "
            f"{model.weights.label} lacks too get the mean of the others"
        )
    return files, notes


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: not a configuration but {type(found).__name__}")
    return found

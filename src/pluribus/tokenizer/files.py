"""Tokenizer folders: read a vocabulary, and write the tokenizer of a merge.

An output vocabulary equal to its source's is written by copying the source's files. Otherwise
tokenizer.json is edited: tokens without a row are taken out, new added tokens become added tokens,
and new ordinary tokens join the model's own vocabulary. For BPE the other models' merges are
appended, after the base's: every token of the new encoding is then a run of base tokens, so what
the base encodes as one token stays so, and the new tokens can be reached. (mergekit 0.1.5 makes
every new token an added token, which is matched anywhere in a text and cuts words apart.) Word
pieces and unigram models have no rank after which to append, so there new tokens do become added
tokens, as in mergekit, with a warning.

Whatever was written is read back: each token must have exactly the id the alignment gave it.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluribus.core.errors import listing, need
from pluribus.core.optional import optional
from pluribus.tokenizer.align import Alignment, VocabIn
from pluribus.tokenizer.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

Spec = dict[str, Any]  # a parsed tokenizer.json

FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
# Any one of these is a tokenizer; the first needs no transformers to be read.
VOCABULARIES = (FAST, "vocab.json", "vocab.txt", "*.model", "*.spm", "*.tiktoken")
COPIED = (
    *(FAST, CONFIG, SPECIAL, ADDED, "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tokenization_*.py", "chat_template.*"),
    "additional_chat_templates/*.jinja",
)
COPIED_WITH_EDIT = ("chat_template.*", "additional_chat_templates/*.jinja")


def load_vocab(
    folder: str | os.PathLike[str], *, label: str | None = None, rows: int | None = None
) -> VocabIn:
    """Return the vocabulary of a tokenizer folder.

    `rows` is the number of rows of the model's embedding matrix; without it, one per id. Raises
    TokenizerError if the folder has no tokenizer or it cannot be read, and ExtraError if reading it
    takes a package that is not installed.
    """
    folder = _require(Path(folder))
    label = label or str(folder)
    if (folder / FAST).is_file():
        fast = read_fast(folder / FAST)
        tokens = fast.get_vocab(with_added_tokens=True)
        # transformers gives ids to tokens that only the configuration declares.
        if all(token in tokens for token in _declared(folder)):
            added = [t.content for _, t in sorted(fast.get_added_tokens_decoder().items())]
            return _vocab(label, tokens, added, rows)
    slow = _read_with_transformers(folder)
    added = [t.content for _, t in sorted(slow.added_tokens_decoder.items())]
    return _vocab(label, slow.get_vocab(), added, rows)


def write_tokenizer(
    out: str | os.PathLike[str],
    alignment: Alignment,
    folders: Sequence[str | os.PathLike[str]],
    *,
    donor: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Write the tokenizer of an alignment into a folder and return the warnings.

    `folders` hold the models' tokenizers in the order given to `align`, `donor` that of a source
    outside the merge. Raises TokenizerError if what was written does not read back as the
    alignment's vocabulary.
    """
    out = Path(out)
    chosen = donor if alignment.template is None else folders[alignment.template]
    if chosen is None:
        raise TokenizerError(f"tokenizer source '{alignment.report.source}': its folder is missing")
    source = _require(Path(chosen))
    spec, specs, flagged, warnings = None, {}, {}, []
    if alignment.source == "union":
        spec = _load_spec(source)
        others = [Path(f) for i, f in enumerate(folders) if i != alignment.template]
        specs = {str(f): _load_spec(f) for f in dict.fromkeys(others) if f != source}
        flagged, warnings = _added_entries([spec, *specs.values()], alignment.tokens)

    vocab = load_vocab(source)
    out.mkdir(parents=True, exist_ok=True)
    if dict(vocab.tokens) == dict(alignment.tokens) and set(flagged) <= set(vocab.added):
        _copy(source, out, COPIED)
    else:
        spec = spec or _load_spec(source)
        spec, more = _edit(spec, alignment.tokens, flagged, specs)
        _copy(source, out, COPIED_WITH_EDIT)
        _write_json(out / FAST, spec)
        warnings += more + _write_configs(source, out, spec, alignment.tokens)
    check_written(out, alignment)
    return warnings


def check_written(folder: str | os.PathLike[str], alignment: Alignment) -> None:
    """Read a written tokenizer back; raise TokenizerError unless ids are the alignment's."""
    vocab = load_vocab(folder)
    wrong = [
        f"{token!r} has id {vocab.tokens.get(token)}, not {index}"
        for token, index in alignment.tokens.items()
        if vocab.tokens.get(token) != index
    ]
    wrong += [
        f"{token!r} (id {index}) is not in the output vocabulary"
        for token, index in vocab.tokens.items()
        if token not in alignment.tokens
    ]
    wrong += [
        f"{token!r} has id {index}, beyond {alignment.rows} rows"
        for token, index in vocab.tokens.items()
        if index >= alignment.rows
    ]
    if wrong:
        raise TokenizerError(
            f"the tokenizer written to {folder} does not read back as planned: {listing(wrong)}. "
            "Try tokenizer source 'base', or the name of one model"
        )


def _require(folder: Path) -> Path:
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        state = "has no tokenizer" if folder.is_dir() else "is not a folder"
        raise TokenizerError(
            f"{folder} {state}: looked for {', '.join(VOCABULARIES)}. Copy the tokenizer files "
            "there, or leave tokenizer and tokenizer_source out of the recipe"
        )
    return folder


def _vocab(
    label: str, tokens: Mapping[str, int], added: Sequence[str], rows: int | None
) -> VocabIn:
    ordered = dict(sorted(tokens.items(), key=lambda pair: pair[1]))
    if not ordered:
        raise TokenizerError(f"{label}: the tokenizer has no tokens")
    return VocabIn(label, ordered, rows or max(ordered.values()) + 1, tuple(added))


def read_fast(path: Path) -> "tokenizers.Tokenizer":
    """Return a tokenizer.json as an object of the tokenizers package.

    Raises TokenizerError if it cannot be read, ExtraError without the package.
    """
    try:
        import tokenizers
    except ImportError:
        raise need("tokenizers", "hf", "Reading tokenizer.json") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from error


def _read_with_transformers(folder: Path) -> Any:
    hf = optional("transformers", "hf", f"Reading the tokenizer in {folder}")
    try:
        return hf.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # each tokenizer class raises its own
        raise TokenizerError(
            f"{folder}: transformers cannot load the tokenizer: {error}"
        ) from error


def _load_spec(folder: Path) -> Spec:
    folder = _require(folder)
    if (folder / FAST).is_file():
        spec = _read_json(folder / FAST)
        known = _spec_vocab(spec)
        if all(token in known for token in _declared(folder)):
            return spec
    slow = _read_with_transformers(folder)
    fast = getattr(slow, "backend_tokenizer", None)
    if fast is None:
        raise TokenizerError(
            f"{folder}: its tokenizer has no fast version, so it cannot be changed or joined with "
            "others; use tokenizer source 'base' without a tokens block"
        )
    return json.loads(fast.to_str())


def _spec_vocab(spec: Spec) -> dict[str, int]:
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):  # unigram: [piece, score] by position
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    return vocab | {entry["content"]: entry["id"] for entry in spec["added_tokens"]}


def _model_type(spec: Spec) -> str:
    model = spec["model"]
    return model.get("type") or ("BPE" if "merges" in model else "unknown")


def _added_entries(specs: Sequence[Spec], tokens: Mapping[str, int]) -> tuple[Spec, list[str]]:
    """Return the added tokens of all models by the first definition of each, and warnings."""
    entries: Spec = {}
    disputed = {}
    for spec in specs:
        for entry in sorted(spec["added_tokens"], key=lambda e: e["id"]):
            content = entry["content"]
            if content not in tokens:
                continue
            first = entries.setdefault(content, entry)
            if {**first, "id": 0} != {**entry, "id": 0}:
                disputed[content] = None
    warnings = []
    if disputed:
        names = listing(map(repr, disputed))
        warnings.append(f"added tokens with different settings, using the first: {names}")
    return entries, warnings


def _edit(
    spec: Spec, tokens: Mapping[str, int], flagged: Spec, others: Mapping[str, Spec]
) -> tuple[Spec, list[str]]:
    """Return the spec with exactly the given vocabulary, and warnings."""
    spec = copy.deepcopy(spec)
    warnings = []
    model, kind = spec["model"], _model_type(spec)
    before = _spec_vocab(spec)
    # Ordinary tokens that are new; those of the recipe are in no other spec and become added ones.
    inside: set[str] = set().union(*(_spec_vocab(other) for other in others.values()))
    ordinary = [t for t in tokens if t not in before and t in inside and t not in flagged]

    spec["added_tokens"] = [e for e in spec["added_tokens"] if e["content"] in tokens]
    entries = {e["content"]: e for e in spec["added_tokens"]}
    new_added = [t for t in tokens if t not in before and t not in ordinary]
    if ordinary and kind not in ("BPE", "WordLevel"):
        new_added += ordinary
        warnings.append(
            f"{len(ordinary)} new tokens are written as added tokens, because a {kind} tokenizer "
            "has no place to append to; they are matched anywhere in a text"
        )
    for token in [*flagged, *new_added]:
        entries.setdefault(token, {**_PLAIN, **flagged.get(token, {}), "content": token})
    for token, entry in entries.items():
        entry["id"] = tokens[token]
    spec["added_tokens"] = sorted(entries.values(), key=lambda e: e["id"])

    if isinstance(model["vocab"], list):
        model["vocab"] = [pair for pair in model["vocab"] if pair[0] in tokens]
        return spec, warnings
    if kind in ("BPE", "WordLevel"):
        # Added tokens too: an added token outside the vocabulary gets the id len(vocabulary) on
        # loading, which is wrong as soon as ordinary tokens follow it.
        model["vocab"] = dict(tokens)
    else:
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t in tokens}
    if kind == "BPE":
        warnings += _append_merges(spec, others)
    return spec, warnings


_PLAIN = {
    "id": -1,
    "content": "",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


def _append_merges(spec: Spec, others: Mapping[str, Spec]) -> list[str]:
    model = spec["model"]
    vocab = model["vocab"]
    prefix = len(model.get("continuing_subword_prefix") or "")
    merges: dict[tuple[str, str], None] = {}
    warnings = []

    def take(pairs: Iterable[tuple[str, str]]) -> None:
        for left, right in pairs:
            if left in vocab and right in vocab and left + right[prefix:] in vocab:
                merges[left, right] = None

    take(_pairs(model))
    for label, other in others.items():
        if _model_type(other) != "BPE" or _splitting(other) != _splitting(spec):
            warnings.append(
                f"{label}: it splits text in another way than the base (model type, normalizer or "
                "pre-tokenizer), so its own tokens get rows but no text is encoded to them"
            )
            continue
        take(_pairs(other["model"]))
    text = model["merges"] and isinstance(model["merges"][0], str)
    if text and not any(" " in part for pair in merges for part in pair):
        model["merges"] = [f"{left} {right}" for left, right in merges]
    else:
        model["merges"] = [list(pair) for pair in merges]
    return warnings


def _pairs(model: Spec) -> Iterable[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _splitting(spec: Spec) -> tuple[Any, ...]:
    model = spec["model"]
    return (
        spec.get("normalizer"),
        spec.get("pre_tokenizer"),
        bool(model.get("byte_fallback")),
        model.get("continuing_subword_prefix") or "",
        model.get("end_of_word_suffix") or "",
    )


def _write_configs(source: Path, out: Path, spec: Spec, tokens: Mapping[str, int]) -> list[str]:
    """Write the side files so that they declare the tokens of the spec and no others."""
    removed: dict[str, None] = {}
    for name in (CONFIG, SPECIAL):
        if not (source / name).is_file():
            continue
        values = _without_lost(_read_json(source / name), tokens, removed)
        if "added_tokens_decoder" in values:
            values["added_tokens_decoder"] = {
                str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
                for entry in spec["added_tokens"]
            }
        _write_json(out / name, values)
    if (source / ADDED).is_file():
        _write_json(out / ADDED, {e["content"]: e["id"] for e in spec["added_tokens"]})
    if not removed:
        return []
    return [f"special tokens without a row, taken out: {listing(map(repr, removed))}"]


def _without_lost(values: Spec, tokens: Mapping[str, int], removed: dict[str, None]) -> Spec:
    """Return a tokenizer configuration without special tokens that are not in the vocabulary."""

    def kept(value: Any) -> bool:
        content = _content(value)
        if content is None or content in tokens:
            return True
        removed[content] = None
        return False

    out = {}
    for key, value in values.items():
        if key in _SPECIAL_LISTS and isinstance(value, list):
            out[key] = [v for v in value if kept(v)]
        elif key in _SPECIAL_LISTS and isinstance(value, dict):
            out[key] = {k: v for k, v in value.items() if kept(v)}
        elif not key.endswith("_token") or kept(value):
            out[key] = value
    return out


_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _declared(folder: Path) -> list[str]:
    """Return the tokens that the side files of a tokenizer name."""
    found: list[Any] = []
    for name in (CONFIG, SPECIAL):
        if not (folder / name).is_file():
            continue
        values = _read_json(folder / name)
        found += [value for key, value in values.items() if key.endswith("_token")]
        found += (values.get("added_tokens_decoder") or {}).values()
        for key in _SPECIAL_LISTS:
            many = values.get(key) or []
            found += many.values() if isinstance(many, dict) else many
    if (folder / ADDED).is_file():
        found += _read_json(folder / ADDED)
    return [content for value in found if (content := _content(value)) is not None]


def _copy(source: Path, out: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            target = out / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            if not (target.exists() and target.samefile(path)):
                shutil.copyfile(path, target)


def _read_json(path: Path) -> Spec:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error


def _write_json(path: Path, value: Spec) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)

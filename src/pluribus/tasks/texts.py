"""Text sets as files: one JSON object a line, compressed, with the split written in each row.

A labelled set has `text`, or `a` and `b` for pairs, and `label` and `split` (train, dev or test).
`rows` reads any such file as it stands; `labelled` makes a `TextSet` of one.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pluribus.core.errors import FormatError
from pluribus.core.whole import whole_file

SPLITS = ("train", "dev", "test")
COVERED = (
    *("split", "task", "text", "a", "b", "input", "question"),
    *("label", "target", "answer", "final"),
)


class TextRow(NamedTuple):
    """One text or pair of texts, and the index of its class."""

    text: str
    pair: str | None
    label: int


class TextSet(NamedTuple):
    """Labelled texts, split as their file splits them; `dev` may be empty."""

    train: list[TextRow]
    dev: list[TextRow]
    test: list[TextRow]
    classes: tuple[str, ...]  # in alphabetical order


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl.gz file, each with a `split`. Raises FormatError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = list(file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not a readable .jsonl.gz: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or row.get("split") not in SPLITS:
            raise FormatError(
                f"{path}, line {number}: expected an object with a split of {', '.join(SPLITS)}"
            )
        found.append(row)
    if not found:
        raise FormatError(f"{path} holds no rows")
    return found


def labelled(found: list[dict[str, Any]], where: str) -> TextSet:
    """Make a set of rows with text (or a and b), label and split; `where` is for errors."""
    classes = tuple(sorted({_text(row, "label", where) for row in found}))
    index = {name: i for i, name in enumerate(classes)}
    splits: dict[str, list[TextRow]] = {split: [] for split in SPLITS}
    for row in found:
        single = "text" in row
        text = _text(row, "text" if single else "a", where)
        pair = None if single else _text(row, "b", where)
        splits[row["split"]].append(TextRow(text, pair, index[row["label"]]))
    for split in ("train", "test"):
        if not splits[split]:
            raise FormatError(f"{where} has no rows with split '{split}'")
    return TextSet(splits["train"], splits["dev"], splits["test"], classes)


def digest(found: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of a set's rows, whatever their order.

    It covers what tasks use: split, texts, labels and answers, and none of the further fields that
    a file may carry.
    """
    kept = (
        json.dumps({key: row[key] for key in COVERED if key in row}, ensure_ascii=True)
        for row in found
    )
    return hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()


def write(path: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as .jsonl.gz, the same bytes for the same rows, whole or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    with whole_file(path, parents=True) as part:
        part.write_bytes(gzip.compress(lines.encode(), mtime=0))


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise FormatError(
            f"{where}: a row's {key} is {value!r}; every row needs text (or a and b) and label"
        )
    return value

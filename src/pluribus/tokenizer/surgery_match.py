"""Which row of a model stands for each token of a donor's vocabulary.

Tokens are compared by what they mean, not by how a tokenizer spells them: by their text, a word's
start (`Ġ` or `▁`) being a space, and special tokens by their role, so `<s>` and `<|begin_of_text|>`
match if both open a text. mergekit-tokensurgeon 0.1.5 goes less far. There only the first mark of a
token counts, and byte-level spelling is left as it is, so that `ĠĠ` and `▁▁`, or `Ã©` and `é`, do
not match; a special token without a match by role is not looked for by its own string; and
additional special tokens all have one role, so that all but one of them lose their row.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pluribus.core.shapes import Int64, UInt8
from pluribus.tokenizer.align import VocabIn
from pluribus.tokenizer.errors import TokenizerError
from pluribus.tokenizer.files import CONFIG, SPECIAL, load_vocab

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
MARKS = ("Ġ", "▁")  # of a word's start: byte-level tokenizers, sentence pieces
Key = str | tuple[str, str]


class Made(IntEnum):
    """How a row of the output comes about."""

    NONE = 0  # no token has this id, or the donor has no row to approximate it from
    EXACT = 1
    BYTE = 2
    PREFIX = 3
    NEW = 4  # approximated


@dataclass(frozen=True, eq=False)
class Lexicon:
    """A vocabulary with what its tokens mean.

    `roles` are those of special tokens. `mark` stands for a space: `Ġ` says that the spelling is
    byte-level, `▁` that it is not, and without one tokens are their own text.
    """

    vocab: VocabIn
    roles: Mapping[str, str]
    mark: str = "Ġ"

    def key(self, token: str) -> Key:
        """Return what a token is compared by."""
        if token in self.roles:
            return ("role", self.roles[token])
        text = self._text(token)
        if text is None:
            return ("part", token)
        return ("word", text[1:]) if text.startswith(" ") else text

    def text(self, token: str) -> str:
        """Return the text that a token stands for; a part of a character is spelled as it is."""
        text = self._text(token)
        return token if text is None else text

    def _text(self, token: str) -> str | None:
        if token in self._whole or not self.mark:
            return token
        if self.mark == "▁":
            return token.replace("▁", " ")
        try:
            return bytes(_bytes()[char] for char in token).decode()
        except (KeyError, UnicodeDecodeError):
            return None

    @cached_property
    def _whole(self) -> frozenset[str]:
        """Tokens that are matched in a text before it is cut into words or bytes."""
        return frozenset((*self.roles, *self.vocab.added))

    def byte(self, token: str) -> int | None:
        """Return the byte that a token stands for, if it is one."""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                return None
        if len(token) != 1:
            return None
        if self.mark == "Ġ":
            return _bytes().get(token)
        return ord(token) if ord(token) < 128 else None

    @cached_property
    def keys(self) -> dict[Key, int]:
        """Rows by key, of the tokens that have one."""
        rows: dict[Key, int] = {}
        for token, row in self.vocab.ordered().items():
            rows.setdefault(self.key(token), row)
        return rows

    @cached_property
    def by_byte(self) -> dict[int, int]:
        """Rows by byte."""
        rows: dict[int, int] = {}
        for token, row in self.vocab.ordered().items():
            value = self.byte(token)
            if value is not None:
                rows.setdefault(value, row)
        return rows

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.vocab.tokens))


def read_lexicon(folder: Path, *, label: str, rows: int) -> Lexicon:
    """Read a tokenizer folder; see `load_vocab` for what it raises."""
    vocab = load_vocab(folder, label=label, rows=rows)
    starts = [sum(token.startswith(mark) for token in vocab.tokens) for mark in MARKS]
    return Lexicon(vocab, _roles(folder), MARKS[starts[1] > starts[0]] if any(starts) else "")


def _roles(folder: Path) -> dict[str, str]:
    """Return special tokens with their roles; a token that has several has the first."""
    told: dict[str, str] = {}
    for name in (SPECIAL, CONFIG):  # the latter is the newer word
        path = folder / name
        if not path.is_file():
            continue
        try:
            values: Any = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise TokenizerError(f"{path} is not JSON: {error}") from error
        for role in ROLES:
            value = values.get(f"{role}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                told[role] = value
    out: dict[str, str] = {}
    for role in ROLES:
        if role in told:
            out.setdefault(told[role], role)
    return out


@dataclass(frozen=True, eq=False)
class Matched:
    """For each output row, which is a token id of the donor: how it is made, and the model's row.

    `row` is -1 where nothing is copied.
    """

    made: UInt8[np.ndarray, " v"]
    row: Int64[np.ndarray, " v"]
    tokens: Mapping[int, str]  # the donor's, by id

    def count(self, *kinds: Made) -> int:
        """Return how many rows are made in one of these ways."""
        return int(np.isin(self.made, kinds).sum())

    @property
    def anchors(self) -> Int64[np.ndarray, " n"]:
        """Ids of the tokens that both have."""
        return np.flatnonzero(self.made == Made.EXACT)

    @property
    def new(self) -> Int64[np.ndarray, " m"]:
        """Ids of the tokens to approximate."""
        return np.flatnonzero(self.made == Made.NEW)


def match(
    model: Lexicon,
    donor: Lexicon,
    *,
    byte: bool = False,
    prefix: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Matched:
    """Match the donor's tokens with the model's rows.

    `byte` also takes the row of the same byte written otherwise (`<0x0A>` and `Ċ`), `prefix` that
    of the longest proper prefix. Rows beyond the donor's largest id come from `pad_to_multiple_of`.
    """
    tokens = {index: token for token, index in donor.vocab.tokens.items()}
    rows = max(tokens) + 1
    step = pad_to_multiple_of or 1
    rows = -(-rows // step) * step
    made, row = np.zeros(rows, np.uint8), np.full(rows, -1, np.int64)
    strings = model.vocab.ordered()
    for index, token in sorted(tokens.items()):
        found, kind = model.keys.get(donor.key(token)), Made.EXACT
        if found is None and (token in donor.roles or token in model.roles):
            found = strings.get(token)
        if found is None and byte:
            value = donor.byte(token)
            found, kind = None if value is None else model.by_byte.get(value), Made.BYTE
        if found is None and prefix:
            found = next((model.keys[k] for k in _prefixes(model, donor, token)), None)
            kind = Made.PREFIX
        if found is not None:
            made[index], row[index] = kind, found
        elif index < donor.vocab.rows:
            made[index] = Made.NEW
    return Matched(made, row, tokens)


def _prefixes(model: Lexicon, donor: Lexicon, token: str) -> Iterator[Key]:
    """Yield the keys of a token's proper prefixes that the model has, the longest first."""
    key = donor.key(token)
    if isinstance(key, tuple) and key[0] != "word":
        return
    inside = key[1] if isinstance(key, tuple) else key
    for stop in range(min(len(inside) - 1, model.longest), 0, -1):
        part = inside[:stop]
        if not part.strip():
            return
        shorter: Key = ("word", part) if isinstance(key, tuple) else part
        if shorter in model.keys:
            yield shorter


@cache
def _bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves; the others, in order, are U+0100 and on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in plain}
    rest = (value for value in range(256) if chr(value) not in table)
    return table | {chr(256 + i): value for i, value in enumerate(list(rest))}


def pieces_of(
    model: Lexicon, donor: Lexicon, encode: Callable[[str], list[int]]
) -> Callable[[str], list[int]]:
    """Return what cuts a donor's token into rows of the model by the model's own tokenizer.

    A part of a character is no text: its pieces are the model's rows of its bytes, as far as there
    are any.
    """

    def pieces(token: str) -> list[int]:
        if donor.key(token) == ("part", token):
            values = map(donor.byte, token)
            return [model.by_byte[value] for value in values if value in model.by_byte]
        return [row for row in encode(donor.text(token)) if row < model.vocab.rows]

    return pieces


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """Return what encodes text with a folder's tokenizer, without special tokens around it."""
    from pluribus.tokenizer import files

    if (folder / files.FAST).is_file():
        fast = files.read_fast(folder / files.FAST)
        fast.no_padding()
        fast.no_truncation()
        return lambda text: fast.encode(text, add_special_tokens=False).ids
    slow = files._read_with_transformers(folder)
    return lambda text: slow(text, add_special_tokens=False)["input_ids"]

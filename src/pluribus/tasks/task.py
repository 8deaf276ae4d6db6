"""A task: examples with known answers, how a language model is asked, how answers are scored.

    score(predictions, targets) in [0, 1] (Matthews correlation: [-1, 1])

`load` is called when a task is evaluated, not when it is named. A sample of the test split is the
examples with the lowest hash of seed and contents: the same ones for every system, whatever the
order of the file.
"""

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import xxhash

from pluribus.core.errors import InputError
from pluribus.tasks.scorers import ACCURACY, Scorer
from pluribus.tasks.sets import Kind

Family = Literal["image", "text", "answer", "zoo"]


class Text(NamedTuple):
    """A text, or a pair of texts, that a task asks about."""

    text: str
    pair: str = ""


class Example(NamedTuple):
    """One row: an image (h, w) or (h, w, c), a `Text`, or a zoo's input, and what is right."""

    input: Any
    target: int | str  # index of the class, or the answer
    worked: str = ""  # what a worked example shows as its answer; empty: the answer itself

    def identity(self) -> bytes:
        """Return bytes that equal rows share: of the input and of the target."""
        told = json.dumps(self.target).encode()
        if isinstance(self.input, tuple):
            return json.dumps(self.input).encode() + told
        array = getattr(self.input, "numpy", lambda: self.input)()
        return f"{array.dtype}{list(array.shape)}".encode() + array.tobytes() + told


@dataclass(frozen=True, eq=False)
class Examples:
    """A task's rows: `test` is scored, worked examples are drawn from `train`."""

    test: Sequence[Example]
    train: Sequence[Example]
    classes: tuple[str, ...] = ()  # empty where the answer is written freely


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """How a row is put to a language model: the answer follows the template after one space."""

    template: str  # with {text}, and {pair} for pairs
    words: Mapping[str, str] = field(default_factory=dict)  # what the model calls a class
    stop: tuple[str, ...] = ("\n",)  # a written answer ends before the first of these
    max_tokens: int = 32  # or after so many

    def __post_init__(self) -> None:
        """Raise InputError for a template without {text} or with other fields."""
        fields = {name for _, name, _, _ in string.Formatter().parse(self.template) if name}
        if "text" not in fields or not fields <= {"text", "pair"}:
            raise InputError(
                f"the template {self.template!r} has the fields {sorted(fields)}; it must have "
                "{text}, may have {pair}, and nothing else"
            )

    def ask(self, example: Example) -> str:
        """Return the question of one row, without an answer."""
        return self.template.format(**example.input._asdict())

    def choices(self, classes: Sequence[str]) -> list[str]:
        """Return what may follow the question, one for each class, with its leading space."""
        return [" " + self.words.get(name, _spoken(name)) for name in classes]

    def before(self, shots: Sequence[Example], classes: Sequence[str]) -> str:
        """Return worked examples to put before a question."""
        choices = self.choices(classes)
        told = []
        for shot in shots:
            right = choices[int(shot.target)] if classes else f" {shot.worked or shot.target}"
            told.append(f"{self.ask(shot)}{right}\n\n")
        return "".join(told)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named task. Frozen; nothing is read before `load` is called."""

    name: str
    load: Callable[[], Examples] = field(repr=False, compare=False)
    score: Scorer = ACCURACY
    family: Family = "text"
    prompt: Prompt | None = None  # needed by language models only
    data: tuple[str, Kind] | None = None  # the set it is read from, to say where that is

    @property
    def metric(self) -> str:
        """The name of what is measured."""
        return self.score.metric


def sample(
    rows: Sequence[Example], count: int | None, seed: int, purpose: str = "test"
) -> list[Example]:
    """Return `count` rows chosen by seed, all of them in file order for None or too large a count.

    Raises InputError for a count below 0.
    """
    if count is not None and count < 0:
        raise InputError(f"{count} rows were asked for; give at least 0, or None for all")
    if count is None or count >= len(rows):
        return list(rows)
    start = f"{seed}\0{purpose}\0".encode()
    ranks = [xxhash.xxh3_128_digest(start + row.identity()) for row in rows]
    order = sorted(range(len(rows)), key=ranks.__getitem__)
    return [rows[i] for i in order[:count]]


def digest(rows: Sequence[Example]) -> str:
    """Return one digest of rows, whatever their order."""
    each = sorted(xxhash.xxh3_128_digest(row.identity()) for row in rows)
    return xxhash.xxh3_128_hexdigest(b"".join(each))


def _spoken(name: str) -> str:
    """Return a class's name as words: `card_arrival?` is `card arrival`."""
    return name.replace("_", " ").rstrip("?").lower()

"""Pairs of prompts that differ in one word, and their tokens.

A `Prompt` asks for `answer`; its corrupted twin has as many tokens and asks for another. What is
measured is the difference of the logits of `answer` and `alternative` at the last token:

    D = logit(answer) - logit(alternative)

Positions are named: a prompt says which characters a name stands for, and `Prompts.position` finds
the last token of them. `NAME+1` is the token behind it; `END` is the last token.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pluribus.core.errors import InputError, MismatchError, listing, nearest
from pluribus.core.shapes import Float, Int

Spans = dict[str, tuple[int, int]]
END = "END"


@dataclass(frozen=True)
class Prompt:
    """A text, its twin, and what each asks for."""

    clean: str
    corrupt: str
    answer: str  # with the space before it, if there is one
    alternative: str
    spans: Spans = field(default_factory=dict)  # characters (first, behind the last) by name
    options: tuple[str, ...] = ()  # answers among which a guesser would choose; the answer is one
    also: tuple[str, ...] = ()  # other answers that are right


@dataclass(frozen=True)
class Stage:
    """One step backwards: which heads matter to the inputs of those found before.

    `side`: "logits", or the input (q, k or v) of the heads that stage `of` found; `only`: those
    with positive or negative effect. `position`: where both are looked at.
    """

    name: str
    side: str = "logits"
    of: str = ""
    only: str = "all"
    position: str = END

    def __post_init__(self) -> None:
        """Raise InputError for a side or sign that there is not."""
        if self.side not in ("logits", "q", "k", "v"):
            raise InputError(f"a stage's side is logits, q, k or v, not {self.side!r}")
        if self.only not in ("all", "positive", "negative"):
            raise InputError(f"a stage takes all, positive or negative heads, not {self.only!r}")
        if (self.side == "logits") == bool(self.of):
            raise InputError(f"stage {self.name!r}: logits are of no stage, all other sides of one")


MOVERS = Stage("movers")
GATHERERS = Stage("gatherers", "q", "movers", "positive")


@dataclass(frozen=True)
class PromptTask:
    """A way to draw prompts, and the stages in which its circuit is looked for."""

    name: str
    about: str
    one: Callable[[random.Random], Prompt]
    stages: tuple[Stage, ...] = (MOVERS, GATHERERS)

    def generate(self, seed: int, n: int) -> list[Prompt]:
        """Return n prompts; the same seed gives the same ones."""
        rng = random.Random(f"{self.name}/{seed}")
        return [self.one(rng) for _ in range(n)]

    def fitting(self, tokenizer: Any, seed: int, n: int) -> "Prompts":
        """Return n prompts that fit a tokenizer: answers of one token, twins of equal length.

        Others are drawn again, in order. Raises InputError if fewer than one in twenty fits, with
        what was wrong with the last.
        """
        rng = random.Random(f"{self.name}/{seed}")
        kept: list[Prompt] = []
        why: InputError | MismatchError | None = None
        for _ in range(20 * n):
            prompt = self.one(rng)
            try:
                encode(tokenizer, [prompt])
                kept.append(prompt)
            except (InputError, MismatchError) as error:
                why = error
            if len(kept) == n:
                return encode(tokenizer, kept)
        raise InputError(f"{self.name}: {len(kept)} of {20 * n} prompts fit the tokenizer; {why}")


@dataclass(frozen=True)
class Prompts:
    """Prompts as tokens, padded behind their end."""

    prompts: tuple[Prompt, ...]
    clean: Int[Tensor, "b s"]
    corrupt: Int[Tensor, "b s"]
    ends: Int[Tensor, " b"]
    answers: Int[Tensor, " b"]
    alternatives: Int[Tensor, " b"]
    places: dict[str, Int[Tensor, " b"]]
    options: tuple[tuple[int, ...], ...]
    right: tuple[tuple[int, ...], ...]  # answers that count, the answer first

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.prompts)

    def position(self, name: str) -> Int[Tensor, " b"]:
        """Return each row's position of a name, `NAME+1` the one behind it.

        Raises InputError with the nearest name; also if a position lies behind the end.
        """
        word, _, more = name.partition("+")
        if word != END and word not in self.places:
            lacking = [p.clean for p in self.prompts if word not in p.spans]
            if any(word in prompt.spans for prompt in self.prompts):
                raise InputError(f"{len(lacking)} prompts have no {word!r}, such as {lacking[0]!r}")
            known = [END, *self.places]
            raise InputError(
                f"the prompts have no position {word!r}; they have {', '.join(known)}."
                + nearest(word, known)
            )
        if more and not more.isdigit():
            raise InputError(f"{name!r} is no position; write NAME or NAME+1")
        found = (self.ends if word == END else self.places[word]) + int(more or 0)
        if bool((found > self.ends).any()):
            raise InputError(f"position {name} lies behind the end of some prompts")
        return found

    def part(self, first: int, last: int) -> "Prompts":
        """Return some of the rows, without columns that only others need."""
        ends = self.ends[first:last]
        width = int(ends.max()) + 1
        return Prompts(
            self.prompts[first:last],
            self.clean[first:last, :width],
            self.corrupt[first:last, :width],
            ends,
            self.answers[first:last],
            self.alternatives[first:last],
            {name: where[first:last] for name, where in self.places.items()},
            self.options[first:last],
            self.right[first:last],
        )

    def parts(self, size: int) -> list["Prompts"]:
        """Return all rows in parts of at most so many."""
        return [self.part(first, first + size) for first in range(0, len(self), size)]


class _Row(NamedTuple):
    clean: list[int]
    corrupt: list[int]
    answer: int
    alternative: int
    places: dict[str, int]
    options: tuple[int, ...]
    right: tuple[int, ...]


def encode(tokenizer: Any, prompts: Sequence[Prompt]) -> Prompts:
    """Return prompts as tokens.

    Raises MismatchError for twins of different length, with both tokenisations, and InputError for
    answers of several tokens, or without prompts.
    """
    if not prompts:
        raise InputError("there are no prompts; give at least one")
    rows = [_row(tokenizer, prompt) for prompt in prompts]
    ends = torch.tensor([len(row.clean) - 1 for row in rows])
    width = int(ends.max()) + 1

    def padded(side: list[list[int]]) -> Tensor:
        return torch.tensor([ids + [0] * (width - len(ids)) for ids in side])

    names = [name for name in rows[0].places if all(name in row.places for row in rows)]
    return Prompts(
        tuple(prompts),
        padded([row.clean for row in rows]),
        padded([row.corrupt for row in rows]),
        ends,
        torch.tensor([row.answer for row in rows]),
        torch.tensor([row.alternative for row in rows]),
        {name: torch.tensor([row.places[name] for row in rows]) for name in names},
        tuple(row.options for row in rows),
        tuple(row.right for row in rows),
    )


def _row(tokenizer: Any, prompt: Prompt) -> _Row:
    found = tokenizer(prompt.clean, return_offsets_mapping=True)
    clean, offsets = list(found["input_ids"]), found["offset_mapping"]
    corrupt = list(tokenizer(prompt.corrupt)["input_ids"])
    if len(clean) != len(corrupt):
        shown = [" ".join(map(repr, _pieces(tokenizer, ids))) for ids in (clean, corrupt)]
        raise MismatchError(
            f"a prompt and its twin have {len(clean)} and {len(corrupt)} tokens, so their "
            f"positions do not match: {shown[0]} | {shown[1]}; use words of equally many tokens"
        )
    places = {}
    for name, (first, last) in prompt.spans.items():
        inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
        if not inside:
            raise InputError(
                f"{name!r} is at characters {first}:{last} of {prompt.clean!r}: no token"
            )
        places[name] = inside[-1]

    def token(answer: str) -> int:
        whole = list(tokenizer(prompt.clean + answer)["input_ids"])
        if whole[: len(clean)] != clean or len(whole) != len(clean) + 1:
            pieces = _pieces(tokenizer, tokenizer(answer, add_special_tokens=False)["input_ids"])
            raise InputError(
                f"the answer {answer!r} is not one token behind {prompt.clean[-40:]!r}: "
                f"{listing(map(repr, pieces))}; choose answers that are"
            )
        return whole[-1]

    answer = token(prompt.answer)
    return _Row(
        clean,
        corrupt,
        answer,
        token(prompt.alternative),
        places,
        tuple(token(option) for option in prompt.options),
        (answer, *(token(other) for other in prompt.also)),
    )


def _pieces(tokenizer: Any, ids: Collection[int]) -> list[str]:
    return [tokenizer.decode([one]) for one in ids]


def logit_difference(logits: Float[Tensor, "b v"], prompts: Prompts) -> Float[Tensor, " b"]:
    """Return D of each prompt."""
    rows = torch.arange(len(logits))
    return logits[rows, prompts.answers] - logits[rows, prompts.alternatives]

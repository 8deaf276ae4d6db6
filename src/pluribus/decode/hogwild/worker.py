"""One worker: the step that it writes, and what it has to read next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pluribus.decode.hogwild.answer import finished
from pluribus.decode.hogwild.blocks import KVBlock

if TYPE_CHECKING:
    from pluribus.decode.hogwild.engine import HogwildEngine

WINDOW = 64  # tokens after which those before are not decoded again


class Worker:
    """A name, a block of its own, and the words of the step under way."""

    def __init__(
        self, name: str, number: int, engine: "HogwildEngine", rng: torch.Generator
    ) -> None:
        self.name, self.number, self.rng = name, number, rng
        self._engine = engine
        self.block = KVBlock(name)
        self.count = 0  # steps begun
        self.ids: list[int] = []  # all tokens of all steps
        self.step_ids: list[int] = []
        self.pending: list[int] = []  # tokens that are still to be read
        self.leaving = False  # whether the step moves once what is pending was read
        self._prefix = 0  # tokens of the step that were not drawn
        self._recent: list[int] = []  # the last tokens, and how much of their text was told
        self._told = 0

    def begin(self, words: str = "", after: Sequence[int] = ()) -> str:
        """Begin a step with the worker's name and some words, and return them.

        `after` is read before them.
        """
        self.count += 1
        self.leaving = False
        text = self._engine.fmt.begins(self.name, self.count) + words
        self.step_ids = self._engine.encode(text)
        self.ids += self.step_ids
        self._prefix = len(self.step_ids)
        self.pending = [*after, *self.step_ids]
        self._recent = list(self.step_ids[-1:])
        self._told = len(self._engine.decode(self._recent))
        return text

    def add(self, token: int) -> str:
        """Take a token that was drawn; return the text that is now sure to follow."""
        self.step_ids.append(token)
        self.ids.append(token)
        self.pending = [token]
        self._recent.append(token)
        text = self._engine.decode(self._recent)
        if text.endswith("\ufffd"):  # a character whose bytes are still to come
            return ""
        piece = text[self._told :]
        self._told = len(text)
        if len(self._recent) > WINDOW:
            self._recent = [token]
            self._told = len(self._engine.decode(self._recent))
        return piece

    def step_text(self) -> str:
        """Return the text of the step under way."""
        return self._engine.decode(self.step_ids)

    def finished(self) -> bool:
        """Whether the words drawn in this step end a paragraph."""
        return finished(self._engine.decode(self.step_ids[self._prefix :]))

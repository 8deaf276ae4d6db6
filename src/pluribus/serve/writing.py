"""One answer while it is written: from logits to events, whoever runs the model."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pluribus.core.shapes import Float
from pluribus.serve.sampling import Likely, Sampler, Sampling, likely
from pluribus.serve.text import Decoder, Stops

log = logging.getLogger("pluribus.serve")


@dataclass(frozen=True)
class Prompt:
    """What is likely at each token of the prompt; the first has nothing before it."""

    likely: Sequence[Likely]  # of the second token on


@dataclass(frozen=True)
class Piece:
    """Some text, and the tokens that it is of. Either may be empty."""

    text: str
    tokens: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer. `ended`: its end token, where the model wrote one."""

    reason: Literal["stop", "length", "cancelled"]
    written: int  # tokens, the end token and those of a stop text among them
    ended: tuple[Likely, ...] = ()
    stop: str | None = None  # the stop text that it ended before
    thought: int = 0  # tokens of those written that the answer does not show
    read: int | None = None  # tokens of the prompt, where only who answered knows them


@dataclass(frozen=True)
class Thought:
    """Text that leads to an answer without being of it, and who wrote it."""

    text: str
    by: str


@dataclass(frozen=True)
class Failed:
    """The model raised while it wrote."""

    error: BaseException


Event = Prompt | Piece | Thought | Done | Failed


@dataclass(eq=False)
class Ask:
    """One answer that is wanted. `send` is called from the model's thread, in order."""

    ids: Sequence[int]  # the prompt's
    sampling: Sampling
    send: Callable[[Event], None]
    stop: Sequence[str] = ()
    log_probs: int | None = None  # how many likely tokens beside each; None: none, nor its own
    echo: bool = False  # the prompt's log-probabilities too
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of models that read more than ids
    part: str | None = None  # of a composite, alone; None: as its router says
    cancelled: bool = False
    begun: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """Leave the batch before the next token."""
        self.cancelled = True


class Writing:
    """Takes logits, chooses tokens, and tells what they add."""

    def __init__(self, ask: Ask, tokenizer: Any, ends: Sequence[int]) -> None:
        self.ask = ask
        self.ends = () if ask.sampling.ignore_end else tuple(ends)
        self.finished = False
        self.written = 0
        self._sampler = Sampler(ask.sampling)
        self._decoder = Decoder(tokenizer)
        self._stops = Stops(ask.stop)
        self._shown = self._decoded = 0  # characters
        self._waiting: list[tuple[int, Likely]] = []  # where a token's text begins, and it

    def take(self, logits: Float[Tensor, " v"], best: int | None = None) -> int:
        """Choose the next token, tell of it, and return it; `best` is the likeliest, if known."""
        sampling, ask = self.ask.sampling, self.ask
        token = best if sampling.greedy and best is not None else self._sampler(logits)
        self.written += 1
        found = None if ask.log_probs is None else likely(logits, token, ask.log_probs)
        if token in self.ends:
            self._end("stop", self._decoder.end(), () if found is None else (found,))
            return token
        start = self._decoded
        text = self._decoder.put(token)
        self._decoded += len(text)
        if found is not None:
            self._waiting.append((start, found))
        shown, stop = self._stops.put(text)
        self._show(shown, whole=stop is not None)
        if stop is not None:
            self._finish(Done("stop", self.written, stop=stop))
        elif self.written >= sampling.max_tokens:
            self._end("length", self._decoder.end())
        return token

    def empty(self) -> None:
        """Finish without a token."""
        self._finish(Done("length", 0))

    def drop(self) -> None:
        """Finish because nobody waits for it any more."""
        if not self.finished:
            self._finish(Done("cancelled", self.written))

    def fail(self, error: BaseException) -> None:
        """Finish because the model raised."""
        if not self.finished:
            self.finished = True
            try:
                self.ask.send(Failed(error))
            except Exception:  # who cannot be told must not end the others' answers
                log.exception("a client could not be told")

    def _show(self, text: str, whole: bool = False) -> None:
        """Send text with the tokens that begin in it; before a stop text, those before it alone."""
        self._shown += len(text)
        ready = [one for at, one in self._waiting if at < self._shown]
        self._waiting = [] if whole else [w for w in self._waiting if w[0] >= self._shown]
        if text or ready:
            self.ask.send(Piece(text, tuple(ready)))

    def _end(
        self, reason: Literal["stop", "length"], left: str, ended: tuple[Likely, ...] = ()
    ) -> None:
        shown, stop = self._stops.put(left)
        self._decoded += len(left)
        if stop is not None:
            self._show(shown, whole=True)
            self._finish(Done("stop", self.written, stop=stop))
            return
        text = shown + self._stops.end()
        self._shown += len(text)
        ready, self._waiting = tuple(one for _, one in self._waiting), []
        if text or ready:
            self.ask.send(Piece(text, ready))
        self._finish(Done(reason, self.written, ended))

    def _finish(self, done: Done) -> None:
        self.finished = True
        self.ask.send(done)

"""Rows that write together: prompts join and answers leave between two tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pluribus.core.shapes import Float, Int
from pluribus.serve.fusing import FusedRunner
from pluribus.serve.runner import CHUNK, Runner
from pluribus.serve.sampling import Likely, likely_rows
from pluribus.serve.writing import Prompt, Writing


class Reading:
    """A prompt on its way into the batch, read alone in pieces."""

    def __init__(self, runner: Runner | FusedRunner, writing: Writing) -> None:
        self.runner, self.writing = runner, writing
        self.ids = list(writing.ask.ids)
        self.size = runner.size(self.ids, writing.ask.inputs)
        self.done = 0
        self.cache: Any = runner.empty()
        self.routes: Float[Tensor, "1 t"] | None = None
        self._echo: list[Likely] = []
        self.last = 0  # the first token of the answer, once it is chosen

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return self.size - self.done

    def step(self) -> None:
        """Read a piece; after the last one choose the first token."""
        ask, runner = self.writing.ask, self.runner
        if not self.done:
            self.routes = runner.route(self.ids, ask.part)
        begin, end = self.done, min(self.done + CHUNK, self.size)
        logits = runner.read(
            self.ids, ask.inputs, begin, end, self.cache, self.routes, every=ask.echo
        )
        if ask.echo:
            after = self.ids[begin + 1 : end + 1]
            told = likely_rows(logits[: len(after)], torch.tensor(after), ask.log_probs or 0)
            self._echo += told
        self.done = end
        if self.left:
            return
        if ask.echo:
            ask.send(Prompt(self._echo))
        if ask.sampling.max_tokens == 0:
            self.writing.empty()
        else:
            self.last = self.writing.take(logits[-1])


class Rows:
    """What is in the batch: an answer, its last token and its length a row."""

    def __init__(self, runner: Runner | FusedRunner) -> None:
        self.runner = runner
        self.writings: list[Writing] = []
        self.last: list[int] = []
        self.lengths: list[int] = []  # tokens in the cache
        self.cache: Any = None
        self.routes: Float[Tensor, "b t"] | None = None

    def __len__(self) -> int:
        return len(self.writings)

    def join(self, read: Sequence[Reading]) -> None:
        """Add prompts that were read and whose answers go on."""
        read = [one for one in read if not one.writing.finished]
        if not read:
            return
        caches = [one.cache for one in read]
        routes = [one.routes for one in read]
        if self.writings:
            caches.insert(0, self.cache)
            routes.insert(0, self.routes)
        self.cache = caches[0] if len(caches) == 1 else self.runner.join(caches)
        self.routes = None if routes[0] is None else torch.cat(routes)  # type: ignore[arg-type]
        self.writings += [one.writing for one in read]
        self.last += [one.last for one in read]
        self.lengths += [len(one.ids) for one in read]

    def leave(self) -> None:
        """Let the rows go whose answers are finished."""
        kept = [i for i, one in enumerate(self.writings) if not one.finished]
        if len(kept) == len(self.writings):
            return
        before = self.lengths
        self.writings = [self.writings[i] for i in kept]
        self.last = [self.last[i] for i in kept]
        self.lengths = [self.lengths[i] for i in kept]
        if not kept:
            self.cache = self.routes = None
            return
        self.runner.keep(self.cache, kept, before)
        if self.routes is not None:
            self.routes = self.routes[kept]

    def step(self) -> None:
        """Write one token of every answer."""
        device = self.runner.device
        ids = torch.tensor(self.last, device=device)[:, None]
        logits = self.runner(ids, self._seen(device), self.cache, self.routes)[:, 0]
        self.lengths = [length + 1 for length in self.lengths]
        best = logits.argmax(-1).tolist()
        for i, writing in enumerate(self.writings):
            self.last[i] = writing.take(logits[i], best[i])

    def _seen(self, device: torch.device) -> Int[Tensor, "b a"]:
        """Return the mask of what is there, the token to come included."""
        lengths = torch.tensor(self.lengths, device=device)[:, None] + 1
        width = max(self.lengths) + 1
        return (torch.arange(width, device=device) >= width - lengths).long()

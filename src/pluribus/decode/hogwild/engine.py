"""Workers of one model that write at once and read each other's words as they appear.

Rodionov et al., Hogwild! Inference, NeurIPS 2025, https://arxiv.org/abs/2504.06261.

    contiguous    [problem, the others' work, split, own work]
    interleaved   [problem and finished steps, own step]
    combined      [problem and finished steps, heading, the others' steps, heading, own step]

A step is a paragraph: a blank line behind a finished sentence. It moves behind the shared ones once
its last token was read. (The authors' code moves it before; its last token then lies in the next
step's block and the shared text lacks the blank line: `compat=True` does so.)

What a worker has read of another's words is never read anew when they move or grow: that is the
method. One worker whose blocks are filled in order decodes exactly as the model alone.

A step of W workers is one pass of W rows. Models below some billions of parameters hardly plan
together (the authors: 3 B poorly); small ones gain speed, not wits.
"""

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pluribus.core.errors import InputError
from pluribus.decode.hogwild.answer import boxed
from pluribus.decode.hogwild.blocks import KVBlock
from pluribus.decode.hogwild.prompts import PromptFormat, names_of
from pluribus.decode.hogwild.reader import Reader
from pluribus.decode.hogwild.sampling import Sampling
from pluribus.decode.hogwild.view import SharedView
from pluribus.decode.hogwild.worker import Worker

Layout = Literal["combined", "interleaved", "contiguous"]
LAYOUTS: tuple[Layout, ...] = ("combined", "interleaved", "contiguous")
OnToken = Callable[[int, str], None]  # worker, piece of text


@dataclass(frozen=True)
class HogwildResult:
    """What workers wrote."""

    text: str  # finished steps in their order, then what was under way
    history: str  # finished steps alone
    per_worker: dict[str, str]
    steps: int  # passes of the model behind the prompt
    tokens: int  # drawn, by all workers
    answer: str | None
    answered_by: str | None  # a worker's name; "finisher"; None: nobody
    cache_bytes: int
    seconds: float
    saved: dict[int, str | None]  # answers that the finisher gave after so many steps
    trace: list[dict[str, Any]] = field(repr=False, default_factory=list)
    finisher_tokens: int = 0  # drawn by the finisher

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the trace."""
        kept = ("text", "history", "per_worker", "steps", "tokens", "answer", "answered_by")
        return {name: getattr(self, name) for name in kept} | {
            "cache_bytes": self.cache_bytes,
            "seconds": round(self.seconds, 3),
            "saved": {str(step): answer for step, answer in self.saved.items()},
        }


class HogwildEngine:
    """Runs workers of one causal language model with rotary positions.

    `workers`: how many, or their names. `check_every`: after so many tokens of all workers the next
    new step begins with the question whether it is redundant (0: never). `answer_tokens`: what the
    finisher may write. `ban`: texts whose tokens are never drawn, beside the tokenizer's begin and
    end; `allow_end`: a worker may end, and the others go on.

    Raises InputError for a model whose cache cannot be shared (see `Reader`), an unknown layout, or
    bad names.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layout: Layout = "combined",
        workers: int | Sequence[str] = 2,
        fmt: PromptFormat | None = None,
        *,
        check_every: int = 256,
        answer_tokens: int = 16,
        ban: Collection[str] = ("#",),
        allow_end: bool = False,
        compat: bool = False,
    ) -> None:
        if layout not in LAYOUTS:
            raise InputError(f"layout is {layout!r}; give one of {', '.join(LAYOUTS)}")
        if check_every < 0 or answer_tokens < 0:
            raise InputError("check_every and answer_tokens must be 0 or more")
        self.names = names_of(workers)
        self.reader = Reader(model)
        self.tokenizer, self.layout, self.fmt = tokenizer, layout, fmt or PromptFormat()
        self.check_every, self.answer_tokens = check_every, answer_tokens
        self.allow_end, self.compat = allow_end, compat
        self.ends = _ends(model, tokenizer)
        self.banned = _banned(tokenizer, ban) | (set() if allow_end else self.ends)

    def run(
        self,
        problem: str,
        max_steps: int = 256,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        save_at: Collection[int] = (),
        on_token: OnToken | None = None,
        go_on: Callable[[], bool] | None = None,
    ) -> HogwildResult:
        """Let the workers write until one gives `\\boxed{answer}`, or for so many passes.

        Without an answer by then the finisher asks for one. The same seed gives the same text.
        `go_on` is asked before each pass; once it says no, nothing more is written, not even an
        answer. Raises InputError for an empty or too long problem, or fewer than one step.
        """
        if max_steps < 1:
            raise InputError(f"{max_steps} steps; give at least one")
        began = time.perf_counter()
        with self.reader.sharing(), torch.inference_mode():
            run = _Run(self, problem, sampling or Sampling.of(self.reader.model), seed, on_token)
            run.go_on = go_on or run.go_on
            saved: dict[int, str | None] = {}
            while run.steps < max_steps and run.answer is None and run.active and run.go_on():
                run.step()
                if run.steps in save_at and run.answer is None:
                    saved[run.steps] = self._forced(run)
            answer, by = run.answer, run.answered_by
            if answer is None and self.answer_tokens and run.go_on():
                answer = self._forced(run)
                by = None if answer is None else "finisher"
        return HogwildResult(
            text=run.text(),
            history=self.decode(run.history),
            per_worker={w.name: self.decode(w.ids) for w in run.workers},
            steps=run.steps,
            tokens=run.drawn,
            answer=answer,
            answered_by=by,
            cache_bytes=run.view.nbytes(),
            seconds=time.perf_counter() - began,
            saved=saved,
            trace=run.trace,
            finisher_tokens=run.finishing,
        )

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens' text."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, problem: str) -> list[int]:
        """Return the tokens before the shared history: in the chat template, where there is one."""
        told = self.fmt.problem(self.names, problem)
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": told}], add_generation_prompt=True, tokenize=False
            )
            return self.encode(text)
        return list(self.tokenizer(told)["input_ids"])

    def _forced(self, run: "_Run") -> str | None:
        """Return the answer that the model gives, greedily, to all that was written."""
        open_steps = [w.step_ids for w in run.workers if w.step_ids]
        ids = [*run.prompt, *run.history, *self.encode(self.fmt.others)]
        for step in open_steps:
            ids += [*step, *self.encode(self.fmt.mark)]
        ids += self.encode(self.fmt.force)
        block = KVBlock("finisher")
        logits = self.reader.read([block], ids)
        written: list[int] = []
        view = SharedView([[block]], self.reader.rotation)
        while logits is not None and len(written) < self.answer_tokens and run.go_on():
            token = int(logits[0].argmax())
            run.finishing += 1
            if token in self.ends:
                break
            written.append(token)
            if (found := boxed(_last(self.fmt.force) + self.decode(written))) is not None:
                return found or None
            logits = self.reader.step(view, [[token]])
        return self.decode(written).split("\n")[0].strip() or None


class _Run:
    """The state of one problem."""

    def __init__(
        self,
        engine: HogwildEngine,
        problem: str,
        sampling: Sampling,
        seed: int,
        on_token: OnToken | None,
    ) -> None:
        if not problem.strip():
            raise InputError("the problem is empty; give a text")
        self.engine, self.sampling, self.on_token = engine, sampling, on_token
        self.steps = self.drawn = self.since_check = self.finishing = 0
        self.go_on: Callable[[], bool] = lambda: True
        self.history: list[int] = []  # tokens of finished steps
        self.answer: str | None = None
        self.answered_by: str | None = None
        self.trace: list[dict[str, Any]] = []
        self.workers = [
            Worker(name, number, engine, torch.Generator().manual_seed(seed * 1000003 + number))
            for number, name in enumerate(engine.names)
        ]
        self.active = list(self.workers)
        self.warned = False
        self.prompt = engine.prompt(problem)
        if engine.layout != "contiguous":
            self.prompt += engine.encode(engine.fmt.history)
        self._check_room(len(self.prompt))
        self.common, self.others, self.own = (KVBlock(n) for n in ("history", "others", "own"))
        engine.reader.read([self.common], self.prompt)
        self._headings()
        for worker in self.workers:
            self._begin(worker, engine.fmt.opening(worker.number))
        self.view = self._view()

    def step(self) -> None:
        """Let every worker that has not ended read what it has to, and draw a token."""
        engine = self.engine
        logits = engine.reader.step(self.view, [worker.pending for worker in self.active])
        self.steps += 1
        ended = []
        for row, worker in zip(logits, self.active, strict=True):
            if worker.leaving:
                self._move(worker)
                self._begin(worker, self._question())
                continue
            if engine.banned:
                row[list(engine.banned)] = -torch.inf
            token = self.sampling.draw(row, worker.rng)
            self.drawn += 1
            self.since_check += 1
            if token in engine.ends:
                ended.append(worker)
                continue
            piece = worker.add(token)
            if self.on_token is not None and piece:
                self.on_token(worker.number, piece)
            found = boxed(worker.step_text()) if "}" in piece else None
            if found:
                self.answer, self.answered_by = found, worker.name
                self._note(worker, "answer", found)
                return
            if engine.layout != "contiguous" and worker.finished():
                if engine.compat:
                    self._move(worker)
                    self._begin(worker, self._question(), after=[token])
                else:
                    worker.leaving = True
        if ended:
            for worker in ended:
                self._note(worker, "end", worker.step_text())
            self.active = [worker for worker in self.active if worker not in ended]
        if ended and self.active:
            self.view = self._view()
        self._check_length()

    def text(self) -> str:
        """Return finished steps and those under way."""
        decode = self.engine.decode
        parts = [decode(self.history), *(w.step_text() for w in self.workers if w.step_ids)]
        return "\n\n".join(part.rstrip() for part in parts if part.strip())

    def _begin(self, worker: Worker, words: str, after: Sequence[int] = ()) -> None:
        text = worker.begin(words, after)
        if self.on_token is not None:
            self.on_token(worker.number, text)

    def _move(self, worker: Worker) -> None:
        worker.block.move_into(self.common, self.engine.reader.rotation)
        self.history += worker.step_ids
        self._note(worker, "step", worker.step_text())

    def _question(self) -> str:
        """Return the question of whether work is redundant, if it is time for it."""
        if not self.engine.check_every or self.since_check < self.engine.check_every:
            return ""
        self.since_check = 0
        return self.engine.fmt.check

    def _headings(self) -> None:
        """Read what stands between the blocks, once for all workers."""
        engine, fmt = self.engine, self.engine.fmt
        if len(self.workers) == 1 or engine.layout == "interleaved":
            return
        if engine.layout == "contiguous":
            engine.reader.read([self.common, self.own], engine.encode(fmt.split))
            return
        engine.reader.read([self.common, self.others], engine.encode(fmt.others))
        heading = engine.encode(fmt.mark + fmt.own)
        engine.reader.read([self.common, self.others, self.own], heading)

    def _view(self) -> SharedView:
        return SharedView(
            [self._row(worker) for worker in self.active], self.engine.reader.rotation
        )

    def _row(self, worker: Worker) -> list[KVBlock]:
        if len(self.workers) == 1 or self.engine.layout == "interleaved":
            return [self.common, worker.block]
        after = self.workers[worker.number + 1 :] + self.workers[: worker.number]
        seen = [other.block for other in after]
        if self.engine.layout == "contiguous":
            return [self.common, *seen, self.own, worker.block]
        return [self.common, self.others, *seen, self.own, worker.block]

    def _note(self, worker: Worker, kind: str, text: str) -> None:
        self.trace.append({"step": self.steps, "worker": worker.name, "kind": kind, "text": text})

    def _check_room(self, length: int) -> None:
        limit = self.engine.reader.limit
        if limit is not None and length >= limit:
            raise InputError(
                f"the problem has {length} tokens with its instructions; the model takes {limit}"
            )

    def _check_length(self) -> None:
        limit = self.engine.reader.limit
        if self.warned or limit is None or self.steps % 16:
            return
        most = max(sum(block.n() for block in row) for row in self.view.rows)
        if most > limit:
            self.warned = True
            warnings.warn(
                f"workers see {most} tokens; the model was made for {limit} positions", stacklevel=4
            )


def _last(text: str) -> str:
    """Return a text from its last opening of an answer on."""
    place = text.rfind("\\boxed{")
    return text[place:] if place >= 0 else ""


def _ends(model: Any, tokenizer: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = set(found) if isinstance(found, list) else {found}
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _banned(tokenizer: Any, texts: Collection[str]) -> set[int]:
    """Return tokens that are one of some characters, repeated, with or without a space before.

    And the token that begins a text, and the one that ends thinking.
    """
    vocabulary = tokenizer.get_vocab()
    found = {
        number
        for token, number in vocabulary.items()
        if (bare := token.lstrip("\u0120\u2581 ")) and any(not bare.replace(t, "") for t in texts)
    }
    if tokenizer.bos_token_id is not None:
        found.add(tokenizer.bos_token_id)
    return found | {vocabulary[token] for token in ("</think>",) if token in vocabulary}

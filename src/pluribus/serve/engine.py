"""The thread of one model: what waits, what is read, what writes; and other work between tokens."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from pluribus.serve import alone
from pluribus.serve.batch import Reading, Rows
from pluribus.serve.fusing import FusedRunner
from pluribus.serve.runner import CHUNK, Runner, runner_of
from pluribus.serve.writing import Ask, Writing

log = logging.getLogger("pluribus.serve")


@dataclass
class Counts:
    """What an engine does now, and did; read by the metrics."""

    waiting: int = 0
    running: int = 0
    steps: int = 0
    tokens: int = 0
    on_step: Callable[[float, int], None] = field(default=lambda seconds, rows: None, repr=False)


class Engine:
    """Runs a model for many at once. Give it `Ask`s; their events come from its thread.

    Models whose rows can be batched write one token of all answers at a time; the others, one
    answer after another. `rows` is the size of the batch.
    """

    def __init__(
        self, model: Any, tokenizer: Any, ends: Sequence[int], rows: int = 16, name: str = "model"
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ends = tuple(ends)
        self.most = rows
        self.counts = Counts()
        self.runner: Runner | FusedRunner | None = runner_of(model)
        self.dead: BaseException | None = None  # what ended the thread, if it did not close
        self._incoming: deque[Ask] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"pluribus {name}", daemon=True)
        self._thread.start()

    @property
    def batches(self) -> bool:
        """Whether several answers are written at a time."""
        return self.runner is not None

    @property
    def usable(self) -> bool:
        """Whether it takes requests: it has neither died nor been closed."""
        return self.dead is None and not self._closed

    def submit(self, ask: Ask) -> None:
        """Queue an answer; its events follow. Raises RuntimeError once the engine is closed."""
        with self._change:
            self._check()
            self._incoming.append(ask)
            self.counts.waiting += 1
            self._change.notify()

    def call(self, work: Callable[[], Any]) -> "Future[Any]":
        """Run something with the model between two tokens; its result comes as a future."""
        future: Future[Any] = Future()
        with self._change:
            self._check()
            self._calls.append((work, future))
            self._change.notify()
        return future

    def close(self, timeout: float | None = 10.0) -> None:
        """Cut off what runs, answer what waits with `cancelled`, and end the thread."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(timeout)

    def _check(self) -> None:
        if self.dead is not None:
            raise RuntimeError(f"the engine has died: {type(self.dead).__name__}")
        if self._closed:
            raise RuntimeError("the engine is closed")

    # -- the thread --------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        self._reading: list[Reading] = []
        self._rows = Rows(self.runner) if self.runner is not None else None
        try:
            self._work()
        except BaseException as fault:  # told by /health, and to all who wait or ask from now on
            error = fault
            log.critical("the engine has died", exc_info=error)
            with self._change:
                self.dead = error
            self._fail(error)
            told = RuntimeError(f"the engine died: {type(error).__name__}")
            self._end(lambda writing: writing.fail(error), lambda call: call.set_exception(told))

    def _work(self) -> None:
        while self._wait():
            self._do_calls()
            if self._rows is None:
                self._one()
                continue
            try:
                self._batch(self._rows)
            except Exception as error:  # told to every client that it concerns; the next ones go on
                log.exception("a batch of %d answers failed", len(self._rows))
                self._fail(error)
            self.counts.running = len(self._rows) + len(self._reading)
        self._end(lambda writing: writing.drop(), lambda call: call.cancel())

    def _fail(self, error: BaseException) -> None:
        """Tell all that write or are read, and begin anew."""
        rows = [] if self._rows is None else self._rows.writings
        concerned = [*rows, *(one.writing for one in self._reading)]
        self._reading = []
        if self._rows is not None:
            self._rows = Rows(self._rows.runner)
        for writing in concerned:
            writing.fail(error)

    def _wait(self) -> bool:
        """Wait until there is something to do. Returns False once the engine is closed."""
        with self._change:
            while not (self._closed or self._incoming or self._calls or self._busy):
                self._change.wait()
            return not self._closed

    @property
    def _busy(self) -> bool:
        return bool(self._reading or self._rows)

    def _do_calls(self) -> None:
        while self._calls:
            work, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
                except BaseException as error:
                    self.dead = error
                    future.set_exception(RuntimeError(f"the engine died: {type(error).__name__}"))
                    raise

    def _next(self) -> Ask | None:
        """Take the next answer that somebody still waits for."""
        while True:
            with self._change:
                if not self._incoming:
                    return None
                ask = self._incoming.popleft()
                self.counts.waiting -= 1
            if not ask.cancelled:
                return ask
            Writing(ask, self.tokenizer, self.ends).drop()

    def _batch(self, rows: Rows) -> None:
        """Take in what waits, read a piece of prompts, and write one token of each answer."""
        for one in [*rows.writings, *(one.writing for one in self._reading)]:
            if one.ask.cancelled:
                one.drop()
        rows.leave()
        self._reading = [one for one in self._reading if not one.writing.finished]
        while len(rows) + len(self._reading) < self.most and (ask := self._next()) is not None:
            writing = Writing(ask, self.tokenizer, self.ends)
            assert self.runner is not None
            self._reading.append(Reading(self.runner, writing))
        self.counts.running = len(rows) + len(self._reading)
        budget = CHUNK
        read = []
        while self._reading and budget > 0:
            first = self._reading[0]
            before = first.left
            try:
                first.step()
            except Exception as error:
                log.exception("reading a prompt of %d tokens failed", len(first.ids))
                self._reading.pop(0)
                first.writing.fail(error)
                continue
            budget -= before - first.left
            if not first.left:
                read.append(self._reading.pop(0))
                self.counts.tokens += first.writing.written
        rows.join(read)
        if len(rows):
            self._timed(rows.step, len(rows))
            rows.leave()

    def _timed(self, step: Callable[[], None], rows: int) -> None:
        begun = time.monotonic()
        step()
        self.counts.steps += 1
        self.counts.tokens += rows
        self.counts.on_step(time.monotonic() - begun, rows)

    def _one(self) -> None:
        """Write one answer, whole."""
        ask = self._next()
        if ask is None:
            return
        writing = Writing(ask, self.tokenizer, self.ends)
        self.counts.running = 1
        last = time.monotonic()

        def told() -> None:
            nonlocal last
            now = time.monotonic()
            self.counts.steps += 1
            self.counts.tokens += 1
            self.counts.on_step(now - last, 1)
            last = now
            if self._closed:
                ask.cancel()

        try:
            alone.write(self.model, writing, told)
        except Exception as error:
            log.exception("an answer failed")
            writing.fail(error)
        self.counts.running = 0

    def _end(
        self, last: Callable[[Writing], None], no_call: Callable[["Future[Any]"], Any]
    ) -> None:
        """Have the last word with all that write, wait, or have calls."""
        with self._change:
            waiting, calls = [*self._incoming], [*self._calls]
            self._incoming.clear()
            self._calls.clear()
        rows = [] if self._rows is None else self._rows.writings
        for writing in [*rows, *(one.writing for one in self._reading)]:
            last(writing)
        for ask in waiting:
            last(Writing(ask, self.tokenizer, self.ends))
        for _, future in calls:
            no_call(future)
        self.counts.waiting = self.counts.running = 0

"""Run a plan on threads: folds first, then every block is merged, rounded once and written.

A job (one output tensor) goes through rounds. In each round its blocks are read in spans, several
spans on several threads, and feed the folds that are still open; a fold that holds for the whole
model waits until every job has delivered. When no fold is open the blocks are merged. Which thread
does what, and when, cannot change a bit: folds join by block order, blocks are the same for every
budget, and each is written to its own place.
"""

import heapq
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pluribus.core.errors import PluribusError
from pluribus.core.merger import stages
from pluribus.engine.blocks import Held
from pluribus.engine.plan import SPAN, Job, Plan
from pluribus.engine.spans import Done, Task, Worker, single_threaded


@runtime_checkable
class Sink(Protocol):
    """Where merged blocks go."""

    def write(self, job: Job, block: int, raw: np.ndarray) -> None:
        """Store the bytes of one block of a job's tensor, which are only lent."""
        ...

    def done(self, job: Job, span: int, digests: Mapping[str, list[str]]) -> None:
        """Note that all blocks of a span are stored."""
        ...

    def finished(self, job: Job, span: int) -> bool:
        """Return whether an earlier run stored this span."""
        ...


@dataclass
class Progress:
    """Bytes of input read so far, of those known to be needed."""

    done: int = 0
    total: int = 0


@dataclass
class _Group:
    """A fold over the whole model: waits for the jobs that feed it."""

    fold: Any
    members: list[int]
    state: Any = None
    pending: int = 0
    result: Any = None
    open: bool = True


@dataclass
class _State:
    """How far a job has come."""

    stage: int = 0
    active: dict[str, Any] = field(default_factory=dict)  # open folds by name
    partial: dict[str, Any] = field(default_factory=dict)  # their states in this round
    folded: dict[str, Any] = field(default_factory=dict)
    left: int = 0  # spans of this round that are not done
    waiting: int = 0  # whole-model folds of this round that are not decided
    merging: bool = False
    rounds: int = 0


def threads_of(plan: Plan, threads: int | None, memory: int) -> int:
    """Return how many threads a plan is worth: those asked for, if there is work and memory."""
    most = max((job.working_bytes for job in plan.jobs if job.block <= 1 << 20), default=1)
    spans = sum(-(-job.blocks // SPAN) for job in plan.jobs)
    return max(1, min(threads or os.cpu_count() or 1, memory // max(most, 1), spans))


class Run:
    """One execution of a plan. `run()` returns when every block is in the sink.

    Each thread calls `worker()` once for what executes its tasks: by default a `Worker`, which does
    so in the thread itself. With `merging` off nothing is merged or copied: `folded` holds what the
    folds of each job came to.
    """

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        *,
        threads: int | None = None,
        memory: int = 512 << 20,
        allow_nonfinite: bool = False,
        device: str = "cpu",
        worker: Callable[[], Callable[[Task], Done]] | None = None,
        merging: bool = True,
    ) -> None:
        self.plan, self.sink, self.memory, self.merging = plan, sink, memory, merging
        again = any(job.packed and job.passes > 1 for job in plan.jobs)
        self._held = Held(memory // 2 if again else 0)
        self.memory -= self._held.limit
        self._worker = worker or partial(
            Worker,
            plan,
            sink.write,
            device=device,
            held=self._held,
            allow_nonfinite=allow_nonfinite,
        )
        self.threads = threads_of(plan, threads, memory)
        self.progress = Progress(0, sum(job.bytes_read * self._passes(job) for job in plan.jobs))
        self._ready: list[tuple[int, int, int, int]] = []  # (late?, job, round, span)
        self._lock = threading.Condition()
        self._states: list[_State] = [_State() for _ in plan.jobs]
        self._groups: dict[tuple[int, str], _Group] = {}
        self._in_use = 0
        self._open = 0
        self._error: BaseException | None = None

    @property
    def folded(self) -> list[dict[str, Any]]:
        """Results of the folds by name, a mapping for each job in the plan's order."""
        return [state.folded for state in self._states]

    # -- setting up ------------------------------------------------------------------------------

    def _passes(self, job: Job) -> int:
        """Least number of times a job's inputs are read."""
        return job.passes if self.merging else job.passes - 1

    def _prepare(self) -> None:
        skipped: set[int] = set()
        for job in self.plan.jobs:
            spans = self._spans(job)
            whole = all(self.sink.finished(job, span) for span in range(spans))
            if whole and not job.whole_model:
                skipped.add(job.index)
                self.progress.done += job.bytes_read * self._passes(job)
                continue
            self._open += 1
        for job in self.plan.jobs:
            if job.merger is None or job.index in skipped:
                continue
            for number, stage in enumerate(stages(job.merger)):
                for name, fold in stage.items():
                    if fold.scope == "model":
                        key = (number, name)
                        group = self._groups.setdefault(key, _Group(fold, []))
                        group.members.append(job.index)
        for group in self._groups.values():
            group.pending = len(group.members)
            group.state = group.fold.init()
        for job in self.plan.jobs:
            if job.index not in skipped:
                self._advance(job)

    @staticmethod
    def _spans(job: Job) -> int:
        return -(-job.blocks // SPAN)

    def _advance(self, job: Job) -> None:
        """Open the next stage's folds, or start merging; queue the spans of the new round."""
        state = self._states[job.index]
        todo = stages(job.merger) if job.merger is not None else ()
        if state.active:  # some folds of this stage want the values once more
            self.progress.total += job.bytes_read
        elif state.stage < len(todo):
            state.active = dict(todo[state.stage])
        else:
            state.merging = True
            if not self.merging:
                self._round_done(job, {})
                return
        self._queue(job)

    def _queue(self, job: Job) -> None:
        state = self._states[job.index]
        spans = range(self._spans(job))
        if state.merging:
            kept = [span for span in spans if self.sink.finished(job, span)]
            self.progress.done += sum(self._span_bytes(job, span) for span in kept)
            spans = [span for span in spans if span not in set(kept)]
        state.partial = {name: fold.init() for name, fold in state.active.items()}
        state.left = len(spans)
        state.waiting = sum(fold.scope == "model" for fold in state.active.values())
        late = 0 if state.rounds else 1
        for span in spans:
            heapq.heappush(self._ready, (late, job.index, state.rounds, span))
        state.rounds += 1
        if not spans:
            self._round_done(job, self._finished(job))
        self._lock.notify_all()

    @staticmethod
    def _span_bytes(job: Job, span: int) -> int:
        size = job.experts[0].spec.size
        elements = min(size, (span + 1) * SPAN * job.block) - span * SPAN * job.block
        return sum(elements * source.spec.kind.size for source in job.sources)

    # -- rounds ----------------------------------------------------------------------------------

    def _finished(self, job: Job) -> dict[str, Any]:
        """Return what a job's own folds came to in a round of which all spans are in."""
        state = self._states[job.index]
        return {
            name: fold.finish(state.partial[name])
            for name, fold in state.active.items()
            if fold.scope != "model" and not state.merging
        }

    def _round_done(self, job: Job, results: Mapping[str, Any]) -> None:
        """Close the folds of a round; `results` are those of the job's own."""
        state = self._states[job.index]
        if state.merging:
            self._held.release(job)
            self._open -= 1
            self._lock.notify_all()
            return
        number = state.stage
        closing, state.partial = state.partial, {}
        waits = [name for name, fold in state.active.items() if fold.scope == "model"]
        for name, result in results.items():
            self._settle(job, name, result)
        for name in waits:
            group = self._groups[number, name]
            group.state = group.fold.join(group.state, closing[name])
            group.pending -= 1
            if group.pending == 0:
                self._settle_group(group, name)
        if not waits:
            self._next(job)

    def _settle(self, job: Job, name: str, result: Any) -> None:
        state = self._states[job.index]
        if hasattr(result, "finish"):
            state.active[name] = result
        else:
            del state.active[name]
            state.folded[name] = result

    def _settle_group(self, group: _Group, name: str) -> None:
        result = group.fold.finish(group.state)
        again = hasattr(result, "finish")
        if again:
            group.fold, group.state = result, result.init()
            group.pending = len(group.members)
        else:
            group.state = None
        for index in group.members:
            job, state = self.plan.jobs[index], self._states[index]
            self._settle(job, name, result)
            state.waiting -= 1
        for index in group.members:
            if self._states[index].waiting == 0:
                self._next(self.plan.jobs[index])

    def _next(self, job: Job) -> None:
        state = self._states[job.index]
        if not state.active:
            state.stage += 1
        self._advance(job)

    # -- working ---------------------------------------------------------------------------------

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Work until every block is written.

        Raises the first error of any thread; KeyboardInterrupt stops the threads first.
        """
        with self._lock:
            self._prepare()
        if self._open == 0:
            return
        with single_threaded(self.plan):
            workers = [
                threading.Thread(target=self._work, daemon=True, name=f"pluribus-{i}")
                for i in range(self.threads)
            ]
            for worker in workers:
                worker.start()
            try:
                while any(worker.is_alive() for worker in workers):
                    workers[0].join(0.05) if workers[0].is_alive() else workers[-1].join(0.05)
                    if on_progress is not None:
                        on_progress(self.progress)
            except BaseException as error:
                with self._lock:
                    self._error = self._error or error
                    self._lock.notify_all()
                raise
            finally:
                for worker in workers:
                    worker.join()
        if self._error is not None:
            raise self._error
        if on_progress is not None:
            on_progress(self.progress)

    def _take(self) -> tuple[Job, int, int] | None:
        """Return the next span to work on and the memory it holds, or None when all is done."""
        with self._lock:
            while True:
                if self._error is not None or self._open == 0:
                    return None
                if self._ready:
                    job = self.plan.jobs[self._ready[0][1]]
                    need = job.working_bytes
                    if self._in_use == 0 or self._in_use + need <= self.memory:
                        _, _, _, span = heapq.heappop(self._ready)
                        self._in_use += need
                        return job, span, need
                self._lock.wait()

    def _work(self) -> None:
        try:
            execute = self._worker()
            while (taken := self._take()) is not None:
                job, span, need = taken
                state = self._states[job.index]
                first = state.rounds == 1
                task = Task(job.index, span, state.active, state.folded, state.merging, first)
                try:
                    done = execute(task)
                except PluribusError:
                    raise
                except Exception as error:
                    error.add_note(f"while merging tensor {job.name!r}")
                    raise
                if done.digests is not None:
                    self.sink.done(job, span, done.digests)
                with self._lock:
                    for name, mine in (done.states or {}).items():
                        state.partial[name] = state.active[name].join(state.partial[name], mine)
                    self._in_use -= need
                    self.progress.done += self._span_bytes(job, span)
                    state.left -= 1
                    last = state.left == 0
                    self._lock.notify_all()
                if last:  # nobody else works on this job now
                    results = self._finished(job)
                    with self._lock:
                        self._round_done(job, results)
                        self._lock.notify_all()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._lock.notify_all()

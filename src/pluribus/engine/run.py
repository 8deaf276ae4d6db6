"""Run a plan on threads: folds first, then every block is merged, rounded once and written.

A job (one output tensor) goes through rounds. In each round its blocks are read in spans, several
spans on several threads, and feed the folds that are still open; a fold that holds for the whole
model waits until every job has delivered. When no fold is open the blocks are merged. Which thread
does what, and when, cannot change a bit: folds join by block order, blocks are the same for every
budget, and each is written to its own place.
"""

import heapq
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pluribus.core.dtypes import narrow
from pluribus.core.errors import MismatchError, NonFiniteError, PluribusError
from pluribus.core.fold import values_of
from pluribus.core.merger import At, call, stages
from pluribus.engine.blocks import Reader, Span
from pluribus.engine.plan import SPAN, Job, Plan


class Sink(Protocol):
    """Where merged blocks go."""

    def write(self, job: Job, block: int, raw: np.ndarray) -> None:
        """Store the bytes of one block of a job's tensor."""
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


Check = Callable[[], bool]


class Run:
    """One execution of a plan. `run()` returns when every block is in the sink."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        *,
        threads: int = 2,
        memory: int = 512 << 20,
        allow_nonfinite: bool = False,
        device: str = "cpu",
    ) -> None:
        self.plan, self.sink = plan, sink
        self.memory, self.allow_nonfinite, self.device = memory, allow_nonfinite, device
        most = max((job.working_bytes for job in plan.jobs if job.block <= 1 << 20), default=1)
        self.threads = max(1, min(threads, memory // max(most, 1)))
        self.progress = Progress(0, plan.bytes_read)
        self._ready: list[tuple[int, int, int, int]] = []  # (late?, job, round, span)
        self._lock = threading.Condition()
        self._states: list[_State] = [_State() for _ in plan.jobs]
        self._groups: dict[tuple[int, str], _Group] = {}
        self._in_use = 0
        self._open = 0
        self._error: BaseException | None = None

    # -- setting up ------------------------------------------------------------------------------

    def _prepare(self) -> None:
        skipped: set[int] = set()
        for job in self.plan.jobs:
            spans = self._spans(job)
            whole_model = any(
                fold.scope == "model"
                for stage in (stages(job.merger) if job.merger is not None else ())
                for fold in stage.values()
            )
            if spans == 0 or all(self.sink.finished(job, span) for span in range(spans)):
                if not whole_model:
                    skipped.add(job.index)
                    self.progress.done += job.bytes_read * job.passes
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
        if not state.active and state.stage < len(todo):
            state.active = dict(todo[state.stage])
            if state.rounds >= job.passes:
                self.progress.total += job.bytes_read
        elif not state.active:
            state.merging = True
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
            self._round_done(job)
        self._lock.notify_all()

    @staticmethod
    def _span_bytes(job: Job, span: int) -> int:
        size = job.experts[0].spec.size
        elements = min(size, (span + 1) * SPAN * job.block) - span * SPAN * job.block
        return sum(elements * source.spec.kind.size for source in job.sources)

    # -- rounds ----------------------------------------------------------------------------------

    def _round_done(self, job: Job) -> None:
        """All spans of a round are in: close its folds."""
        state = self._states[job.index]
        if state.merging:
            self._open -= 1
            self._lock.notify_all()
            return
        number = state.stage
        closing, state.partial = state.partial, {}
        waits = [name for name, fold in state.active.items() if fold.scope == "model"]
        for name in [name for name in state.active if name not in waits]:
            self._settle(job, name, state.active[name].finish(closing[name]))
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
            self.progress.total += job.bytes_read
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
        reader = Reader(self.device)
        try:
            while (taken := self._take()) is not None:
                job, span, need = taken
                state = self._states[job.index]
                try:
                    if job.merger is None:
                        self._copy_span(job, span)
                    elif state.merging:
                        self._merge_span(reader, job, span, state)
                    else:
                        self._fold_span(reader, job, span, state)
                except PluribusError:
                    raise
                except Exception as error:
                    error.add_note(f"while merging tensor {job.name!r}")
                    raise
                with self._lock:
                    self._in_use -= need
                    self.progress.done += self._span_bytes(job, span)
                    state.left -= 1
                    if state.left == 0:
                        self._round_done(job)
                    self._lock.notify_all()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._lock.notify_all()

    def _fold_span(self, reader: Reader, job: Job, span: int, state: _State) -> None:
        mine = {name: fold.init() for name, fold in state.active.items()}
        for block in Span(job, span).blocks:
            at = place(job, block, self.plan)
            base, experts, extras = reader.read(job, at, None)
            if state.rounds == 1:
                self._check_finite(reader, job)
            for name, fold in state.active.items():
                values = values_of(fold, base, experts, at, {**extras, **state.folded})
                mine[name] = fold.update(mine[name], values, at)
        with self._lock:
            for name, fold in state.active.items():
                state.partial[name] = fold.join(state.partial[name], mine[name])

    def _merge_span(self, reader: Reader, job: Job, span: int, state: _State) -> None:
        digests: dict[str, list[str]] = {}
        for block in Span(job, span).blocks:
            at = place(job, block, self.plan)
            base, experts, extras = reader.read(job, at, digests)
            if state.rounds == 1:
                self._check_finite(reader, job)
            merged = call(job.merger, base, experts, at, {**extras, **state.folded})
            raw = reader.encode(merged, job)
            digests.setdefault("out", []).append(reader.digest(raw))
            self.sink.write(job, block, raw)
        self.sink.done(job, span, digests)

    def _copy_span(self, job: Job, span: int) -> None:
        digests: dict[str, list[str]] = {}
        first = job.experts[0]
        for block in Span(job, span).blocks:
            start = block * job.block
            stop = min(start + job.block, first.spec.size)
            raw = first.load(start, stop)
            for label, other in zip(job.labels[1:], job.experts[1:], strict=False):
                if not np.array_equal(raw, other.load(start, stop)):
                    raise MismatchError(
                        f"tensor {job.name!r} ({first.spec}) holds whole numbers and is not "
                        f"averaged, but {label} and {job.labels[0]} differ in it; "
                        "make them equal, or leave it out"
                    )
            digests.setdefault(job.labels[0] if job.labels else "in", []).append(Reader.digest(raw))
            if first.spec.dtype != job.spec.dtype:
                raw = narrow(first.floats(start, stop, job.wide), job.spec.kind)
            digests.setdefault("out", []).append(Reader.digest(raw))
            self.sink.write(job, block, raw)
        self.sink.done(job, span, digests)

    def _check_finite(self, reader: Reader, job: Job) -> None:
        if reader.bad and not self.allow_nonfinite:
            label = job.labels[reader.bad[0]] if reader.bad[0] < len(job.labels) else "an input"
            raise NonFiniteError(
                f"{label}: tensor {job.name!r} holds NaN or infinite values; repair that model, "
                "or go on with allow_nonfinite (--allow-nonfinite)"
            )


def place(job: Job, block: int, plan: Plan) -> At:
    """Return where a block lies."""
    spec = job.experts[0].spec
    start = block * job.block
    stop = min(start + job.block, spec.size)
    return At(
        job.name, spec.shape, start, stop, block, job.index, job.layer, plan.layers, plan.seed
    )


class single_threaded:
    """Keep BLAS and torch on one thread while the plan's own threads run: same bits everywhere."""

    def __init__(self, plan: Plan) -> None:
        self.needed = any(
            (job.merger is not None and job.facts.grain == "tensor")
            or any(
                type(source).__name__ not in ("FileSlice", "ArraySource") for source in job.sources
            )
            for job in plan.jobs
        )

    def __enter__(self) -> None:
        self._limits = None
        self._torch = None
        if not self.needed:
            return
        import torch
        from threadpoolctl import threadpool_limits

        self._torch = torch.get_num_threads()
        torch.set_num_threads(1)
        self._limits = threadpool_limits(1)

    def __exit__(self, *_: object) -> None:
        if self._limits is not None:
            self._limits.restore_original_limits()
        if self._torch is not None:
            import torch

            torch.set_num_threads(self._torch)

"""Work through one span: feed its blocks to the open folds, or merge, round and write them.

A `Worker` knows nothing of scheduling, so a thread here and a process on another machine do the
same to a block.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pluribus.core.dtypes import narrow, widen
from pluribus.core.errors import MismatchError, NonFiniteError
from pluribus.core.fold import feeder, looked_at
from pluribus.core.merger import At, accepted, call, fused
from pluribus.core.pool import is_counter
from pluribus.engine.blocks import OUT, Held, Reader, Span
from pluribus.engine.plan import Job, Plan

PIECE = 1024  # elements of a sample taken in one place


class Task(NamedTuple):
    """What to do with one span of a job. Pickles."""

    job: int
    span: int
    folds: Mapping[str, Any]  # those that are open
    folded: Mapping[str, Any]  # results of those that are closed
    merging: bool
    first: bool  # nobody has looked at these inputs yet


class Done(NamedTuple):
    """What came of a task: states of its folds, or the hashes of what was read and written."""

    states: Mapping[str, Any] | None
    digests: Mapping[str, list[str]] | None


class Worker:
    """Executes tasks of one plan, one at a time; `write(job, block, raw)` takes merged blocks."""

    def __init__(
        self,
        plan: Plan,
        write: Callable[[Job, int, np.ndarray], None],
        *,
        device: str = "cpu",
        held: Held | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        self.plan, self.write, self.allow_nonfinite = plan, write, allow_nonfinite
        self.reader = Reader(device, held)
        self.kernels = self.reader.device == "cpu"
        self._aims: dict[tuple[int, str], Any] = {}

    def __call__(self, task: Task) -> Done:
        """Execute one task.

        Raises NonFiniteError, MismatchError for integer buffers that differ, or what a source or
        `write` raises.
        """
        job = self.plan.jobs[task.job]
        if job.merger is None:
            return Done(None, self._copy(job, task.span))
        if task.merging:
            return Done(None, self._merge(job, task))
        return Done(self._fold(job, task), None)

    def _fold(self, job: Job, task: Task) -> dict[str, Any]:
        feeders = {name: feeder(fold, job.merger, name) for name, fold in task.folds.items()}
        kernels = self.kernels and job.wide is np.float32
        packed = kernels and job.packed and None not in feeders.values()
        states = {
            name: fold.init(self._aim(job, task, name, fold))
            if getattr(fold, "aims", False)
            else fold.init()
            for name, fold in task.folds.items()
        }
        known = dict(task.folded)
        for block in Span(job, task.span).blocks:
            at = place(job, block, self.plan)
            base, experts, extras = self.reader.read(job, at, None, packed=packed, check=task.first)
            if task.first:
                self._check_finite(job)
            for name, fold in task.folds.items():
                more = {**extras, **known} if extras else known
                quick = feeders[name]
                if kernels and quick is not None:
                    states[name] = quick(states[name], base, experts, at, more)
                else:
                    values = looked_at(fold, base, experts, at, more)
                    states[name] = fold.update(states[name], values, at)
        return states

    def _aim(self, job: Job, task: Task, name: str, fold: Any) -> Any:
        """Return where a sample of a tensor says that the ranks of a fold will lie, or None."""
        if job.blocks == 1 or job.wide is not np.float32 or not self.kernels:
            return None
        found = self._aims.get((job.index, name))
        if found is None:
            sample = self._sample(job, fold, task.folded)
            found = self._aims[job.index, name] = fold.aim(sample, job.experts[0].spec.size)
            while len(self._aims) > 8:
                del self._aims[next(iter(self._aims))]
        return found

    def _sample(self, job: Job, fold: Any, folded: Mapping[str, Any]) -> np.ndarray:
        """Return what a fold looks at in pieces spread over a tensor, (pieces, t, n).

        One piece, the first block, where many small reads are dear, or where the fold looks at
        places.
        """
        size = job.experts[0].spec.size
        near = all(source.near for source in job.sources) and not job.extras
        if job.facts.grain != "element" or not near or accepted(fold.of, {"at": None}):
            at = place(job, 0, self.plan)
            base, experts, extras = self.reader.read(job, at, None)
            values = looked_at(fold, base, experts, at, {**extras, **folded})
            return np.asarray(values).reshape(1, values.shape[0], -1)
        pieces = min(12 + (size >> 19), 1024)
        length = min(PIECE, size)
        starts = np.linspace(0, size - length, pieces).astype(np.int64).tolist()
        rows = np.empty((len(job.sources), pieces, length), np.float32)
        for row, source in zip(rows, job.sources, strict=True):
            raw = np.empty((pieces, length * source.spec.kind.size), np.uint8)
            for start, part in zip(starts, raw, strict=True):
                source.read(start, start + length, part)
            widen(raw.reshape(-1), source.spec.kind, row.reshape(-1))
        flat = rows.reshape(len(rows), -1)
        base, experts = (None, flat) if job.base is None else (flat[0], flat[1:])
        values = looked_at(fold, base, experts, place(job, 0, self.plan), folded)
        return np.asarray(values).reshape(values.shape[0], pieces, length).swapaxes(0, 1)

    def _merge(self, job: Job, task: Task) -> dict[str, list[str]]:
        digests: dict[str, list[str]] = {}
        kernel = self.kernels and job.wide is np.float32 and fused(job.merger) is not None
        packed = kernel and job.packed
        for block in Span(job, task.span).blocks:
            at = place(job, block, self.plan)
            base, experts, extras = self.reader.read(
                job, at, digests, packed=packed, check=task.first
            )
            if task.first:
                self._check_finite(job)
            out = self.reader.space(job, at) if kernel else None
            merged = call(job.merger, base, experts, at, {**extras, **task.folded}, out)
            raw = self.reader.encode(merged, job)
            digests.setdefault(OUT, []).append(Reader.digest(raw))
            self.write(job, block, raw)
        return digests

    def _copy(self, job: Job, span: int) -> dict[str, list[str]]:
        digests: dict[str, list[str]] = {}
        first = job.experts[0]
        for block in Span(job, span).blocks:
            start = block * job.block
            stop = min(start + job.block, first.spec.size)
            raw = first.load(start, stop)
            seen = {job.labels[0]: raw}
            for label, other in zip(job.labels[1:], job.experts[1:], strict=False):
                seen[label] = other.load(start, stop)
                if not np.array_equal(raw, seen[label]) and not is_counter(job.name):
                    raise MismatchError(
                        f"tensor {job.name!r} ({first.spec}) holds whole numbers and is not "
                        f"averaged, but {label} and {job.labels[0]} differ in it; "
                        "make them equal, or leave it out"
                    )
            for label in dict.fromkeys(job.labels):
                digests.setdefault(label, []).append(Reader.digest(seen.get(label, raw)))
            if first.spec.dtype != job.spec.dtype:
                raw = narrow(first.floats(start, stop, job.wide), job.spec.kind)
            digests.setdefault(OUT, []).append(Reader.digest(raw))
            self.write(job, block, raw)
        return digests

    def _check_finite(self, job: Job) -> None:
        bad = self.reader.bad
        if bad and not self.allow_nonfinite:
            label = job.labels[bad[0]] if bad[0] < len(job.labels) else "an input"
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

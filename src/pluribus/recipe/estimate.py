"""How long a plan takes here: a few MB of its own files and a sample of its own arithmetic, timed.

    seconds = sum over models (bytes / rate) + written / mean rate + sum over jobs (work x cost / n)

n blocks at a time, as threads, processors and memory allow. Work is elements; for methods on whole
tensors it is elements times the shorter side, the order of a singular value decomposition. The cost
is that of merging a small tensor of random numbers in memory, folds and hashes included; so is the
number of passes, which an exact cut may raise.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from pluribus.core.dtypes import narrow
from pluribus.core.errors import PluribusError
from pluribus.core.merger import At
from pluribus.core.source import ArraySource, Source, TensorSpec
from pluribus.engine.plan import BLOCK, Job, Plan
from pluribus.engine.run import Run
from pluribus.engine.sink import MemorySink

CHUNK = 2 << 20  # bytes of a file that each thread reads
READERS = 16  # threads at most that read for the measurement
MODELS = 8  # whose files are read; the others are taken to be as fast
ELEMENTS = 2 * BLOCK  # of a sample: enough for the folds' way with large tensors
MATRIX = 1 << 18  # elements of a sample for methods on whole tensors
SLOW = 0.2  # seconds of a sample that is not repeated more often than needed
GUESS = 1e9  # bytes a second, if no input exists yet


class Estimate(NamedTuple):
    """Seconds a plan takes, and the bytes a second it reads at."""

    seconds: float
    rate: float


class _Cost(NamedTuple):
    seconds: float  # of a unit of work
    passes: float  # bytes read over bytes of the inputs


@dataclass
class Stopwatch:
    """Measures plans one after another; what was measured once is not measured again."""

    device: str = "cpu"
    _rates: dict[str, float] = field(default_factory=dict)

    def estimate(self, plan: Plan, threads: int, memory: int) -> Estimate:
        """Return the time of a plan on some threads with a budget of bytes for blocks.

        Raises InputError for parameters that its method refuses to work with.
        """
        costs: dict[tuple[Any, ...], _Cost] = {}
        for job in sorted(plan.jobs, key=_work, reverse=True):
            if _kind(job) not in costs:
                costs[_kind(job)] = _measured(job, plan, self.device)
        computing = sum(
            _work(job) * costs[_kind(job)].seconds / _abreast(job, threads, memory)
            for job in plan.jobs
        )
        read: dict[str, float] = {}
        sources: dict[str, list[Source]] = {}
        for job in plan.jobs:
            for i, source in enumerate(job.sources):
                label = job.labels[i] if i < len(job.labels) else ""
                passes = costs[_kind(job)].passes
                read[label] = read.get(label, 0.0) + source.spec.nbytes * passes
                sources.setdefault(label, []).append(source)
        self._time_files(sources, threads)
        usual = fmean(self._rates.values()) if self._rates else GUESS
        moving = sum(size / self._rates.get(label, usual) for label, size in read.items())
        moving += plan.bytes_written / usual
        rate = sum(read.values()) / moving if moving else usual
        return Estimate(moving + computing, rate)

    def _time_files(self, sources: Mapping[str, Sequence[Source]], threads: int) -> None:
        """Time reading the largest tensor of some models, in as many places as there are threads.

        A file that cannot be read is left to the run to complain about.
        """
        new = [label for label in sources if label not in self._rates]
        threads = min(threads, READERS)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(abs, range(threads)))  # starts the threads
            for label in new[:MODELS]:
                source = max(sources[label], key=lambda s: s.spec.nbytes)
                step = source.spec.size // threads
                count = min(step, CHUNK // source.spec.kind.size)
                starts = range(0, threads * step, step) if count else ()
                began = time.perf_counter()
                try:
                    list(pool.map(partial(_read, source, count), starts))
                except (PluribusError, OSError):
                    continue
                took = max(time.perf_counter() - began, 1e-9)
                if count:
                    self._rates[label] = len(starts) * count * source.spec.kind.size / took


def _read(source: Source, count: int, start: int) -> None:
    source.load(start, start + count)


def _whole(job: Job) -> bool:
    return job.merger is not None and job.facts.grain == "tensor" and len(job.spec.shape) > 1


def _kind(job: Job) -> tuple[Any, ...]:
    """What one measurement holds for; a plan has one method."""
    return (job.merger is None, _whole(job), len(job.sources), job.wide)


def _abreast(job: Job, threads: int, memory: int) -> int:
    """Return how many such blocks are worked on at a time."""
    return max(1, min(threads, os.cpu_count() or 1, memory // max(job.working_bytes, 1)))


def _work(job: Job) -> float:
    return _work_of(job.experts[0].spec.shape, _whole(job))


def _work_of(shape: Sequence[int], whole: bool) -> float:
    size = math.prod(shape)
    return size * min(shape[0], size // max(shape[0], 1)) if whole else size


def _measured(job: Job, plan: Plan, device: str) -> _Cost:
    small = _sample(job)
    sample = Plan((small,), plan.seed, plan.layers)
    best, passes = math.inf, 1.0
    for turn in range(3):  # the first one compiles and warms up
        run = Run(sample, MemorySink(sample), threads=1, device=device, allow_nonfinite=True)
        began = time.perf_counter()
        run.run()
        took = time.perf_counter() - began
        best, passes = min(best, took), run.progress.done / max(small.bytes_read, 1)
        if turn and took > SLOW:
            break
    return _Cost(best / max(_work(small), 1), max(passes, 1))


def _sample(job: Job) -> Job:
    """Return a job like this one, of a smaller shape and with random values in memory."""
    shape = list(job.experts[0].spec.shape)
    most = MATRIX if _whole(job) else ELEMENTS
    while math.prod(shape) > most:
        axis = shape.index(max(shape)) if _whole(job) else 0
        if shape[axis] == 1:  # one row of an array of many axes is enough
            break
        shape[axis] = -(-shape[axis] // 2)
    whole = job.experts[0].spec.shape
    axes = dict(zip(whole, shape, strict=True))

    def drawn(source: Source, stream: int, update: float) -> ArraySource:
        own = shape if source.spec.shape == whole else [axes.get(n, n) for n in source.spec.shape]
        return _drawn(TensorSpec(source.spec.dtype, tuple(own)), stream, update)

    return replace(
        job,
        spec=TensorSpec(job.spec.dtype, tuple(shape)),
        base=None if job.base is None else drawn(job.base, 0, 0.0),
        experts=tuple(
            drawn(source, 1 + i, 0.0 if job.merger is None else 0.1)
            for i, source in enumerate(job.experts)
        ),
        extras={
            name: tuple(drawn(source, -1, 0.0) for source in group)
            for name, group in job.extras.items()
        },
        index=0,
    )


def _drawn(spec: TensorSpec, stream: int, update: float) -> ArraySource:
    """Return numbers in [0, 1) and an update of its own; in square matrices a strong diagonal."""
    from pluribus.core.random import uniform

    if not spec.kind.is_float:
        return ArraySource(np.zeros(spec.nbytes, np.uint8), spec)
    at, like = At(stop=spec.size), np.empty(0, np.float32)
    values = np.asarray(uniform(at, 0, like))
    if update:
        values += np.float32(update) * (np.asarray(uniform(at, stream, like)) - np.float32(0.5))
    if len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]:
        values = 0.01 * values + np.eye(spec.shape[0], dtype=np.float32).reshape(-1)
    wide = np.float64 if spec.dtype == "F64" else np.float32
    return ArraySource(narrow(values.astype(wide), spec.kind), spec)

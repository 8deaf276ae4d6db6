"""Evaluate points, here or in other processes: what a point scores, costs, or why it failed."""

import dataclasses
import inspect
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from pluribus.core.errors import InputError, PluribusError, need
from pluribus.search.space import Space
from pluribus.search.study import Objective, Status


class WorkerError(PluribusError, RuntimeError):
    """A process that was to evaluate a point and died."""


class Outcome(NamedTuple):
    """What evaluating a point came to; the names are a trial's."""

    status: Status
    scores: dict[str, float]
    metrics: dict[str, float]
    report: dict[str, Any]
    seconds: float
    error: str | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A user's function with its costs: a point's object in, an outcome out."""

    function: Callable[..., Any]
    costs: Mapping[str, Callable[[Any], float] | None]  # None: the function returns it
    objectives: tuple[Objective, ...]  # costs last
    record: bool  # errors make the trial failed; otherwise they are raised

    def __call__(self, make: Callable[[], Any], seed: int) -> Outcome:
        """Make the object and evaluate it. Raises what the function raises unless `record`."""
        report: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            value = make()
            keywords = accepted(self.function, {"seed": seed, "report": report})
            result = self.function(value, **keywords)
            costs = self._measured(value)
        except Exception as error:
            if not self.record:
                raise
            told = str(error) if isinstance(error, PluribusError) else _told(error)
            return Outcome("failed", {}, {}, report, time.perf_counter() - began, told)
        if hasattr(result, "to_dict"):
            report = {**result.to_dict(), **report}
        outcome = self.judged(result, costs)
        return outcome._replace(report=report, seconds=time.perf_counter() - began)

    def outcome(self, space: Space, dna: Any, result: Any) -> Outcome:
        """Return the outcome of a point whose score was found elsewhere."""
        return self.judged(result, self._measured(space.decode(dna)) if self.functions else {})

    @property
    def functions(self) -> dict[str, Callable[[Any], float]]:
        """The costs that are functions of the object."""
        return {name: cost for name, cost in self.costs.items() if cost is not None}

    def _measured(self, value: Any) -> dict[str, float]:
        return {name: float(cost(value)) for name, cost in self.functions.items()}

    def judged(self, result: Any, costs: Mapping[str, float]) -> Outcome:
        """Split what a function returned into scores and metrics; NaN and infinity fail.

        Raises InputError for what is no number and for an objective that is missing.
        """
        own = [o.name for o in self.objectives if o.name not in self.functions]
        given = _figures(result, own)
        scores = {o.name: costs.get(o.name, given.get(o.name, 0.0)) for o in self.objectives}
        metrics = {name: value for name, value in given.items() if name not in scores}
        bad = [name for name, value in scores.items() if not math.isfinite(value)]
        if bad:
            told = f"{bad[0]} is {scores[bad[0]]}"
            return Outcome("failed", scores, metrics, {}, 0.0, told)
        return Outcome("done", scores, metrics, {}, 0.0, None)


def accepted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that a function names among its parameters."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return {}
    return {name: value for name, value in values.items() if name in known}


def _figures(result: Any, names: list[str]) -> dict[str, float]:
    if hasattr(result, "to_dict") and not isinstance(result, Mapping):
        result = {key: v for key, v in result.to_dict().items() if _is_number(v)}
    if _is_number(result):
        if len(names) > 1:
            raise InputError(
                f"evaluate returned one number, but the objectives are {', '.join(names)}: return "
                "a mapping that holds each of them"
            )
        return {names[0]: float(cast(float, result))}
    if isinstance(result, tuple | list):
        raise InputError(
            f"evaluate returned {len(result)} values without names: return a mapping such as "
            f"{{{names[0]!r}: ..., 'size': ...}} and give run(objectives={{...}}) the directions; "
            "several objectives need nsga2 or tpe"
        )
    if not isinstance(result, Mapping):
        raise InputError(
            f"evaluate returned {type(result).__name__}: return a number, or a mapping of names to "
            "numbers"
        )
    for name, value in result.items():
        if not _is_number(value):
            raise InputError(f"evaluate returned {name} = {value!r}, which is no number")
    if lacking := [name for name in names if name not in result]:
        raise InputError(
            f"evaluate returned {', '.join(map(str, result)) or 'nothing'}, but not the objective "
            f"{lacking[0]!r}; name objectives with run(objectives=...)"
        )
    return {str(name): float(value) for name, value in result.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    single = getattr(value, "numel", None)  # a tensor with one element
    return isinstance(value, Real) or (callable(single) and single() == 1)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# -- where -----------------------------------------------------------------------------------------


@runtime_checkable
class Pool(Protocol):
    """Takes points, and hands back outcomes as they come."""

    def submit(self, number: int, space: Space, dna: Any, seed: int) -> None:
        """Begin to evaluate a point."""
        ...

    def wait(self) -> list[tuple[int, Outcome]]:
        """Return at least one outcome, by trial number. Raises what an evaluation raised."""
        ...


@contextmanager
def executor(evaluation: Evaluation, workers: int, ray: bool) -> Iterator[Pool]:
    """Give a pool of so many workers: this process for one, processes or Ray tasks for more."""
    if ray:
        with _on_ray(evaluation) as pool:
            yield pool
    elif workers == 1:
        yield _Here(evaluation)
    else:
        with _in_processes(evaluation, workers) as pool:
            yield pool


class _Here:
    """Evaluates in this process, one after another."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._queue: list[tuple[int, Space, Any, int]] = []

    def submit(self, number: int, space: Space, dna: Any, seed: int) -> None:
        self._queue.append((number, space, dna, seed))

    def wait(self) -> list[tuple[int, Outcome]]:
        number, space, dna, seed = self._queue.pop(0)
        return [(number, self._evaluation(lambda: space.decode(dna), seed))]


class _Futures:
    """Evaluates elsewhere: `start(object, seed)` gives a handle, `first(handles)` those done."""

    def __init__(
        self,
        evaluation: Evaluation,
        start: Callable[[Any, int], Any],
        first: Callable[[list], Any],
    ) -> None:
        self._evaluation, self._start, self._first = evaluation, start, first
        self._running: dict[Any, int] = {}
        self._ready: list[tuple[int, Outcome]] = []

    def submit(self, number: int, space: Space, dna: Any, seed: int) -> None:
        try:
            value = space.decode(dna)
        except PluribusError as error:
            if not self._evaluation.record:
                raise
            self._ready.append((number, Outcome("failed", {}, {}, {}, 0.0, str(error))))
            return
        self._running[self._start(value, seed)] = number

    def wait(self) -> list[tuple[int, Outcome]]:
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        return [
            (self._running.pop(handle), outcome)
            for handle, outcome in self._first(list(self._running))
        ]


@contextmanager
def _in_processes(evaluation: Evaluation, workers: int) -> Iterator[Pool]:
    from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
    from multiprocessing import get_context

    payload = _pickled(evaluation, "evaluate or cost")
    # Spawned, not forked: a fork after torch has used its threads hangs.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_load, initargs=(payload, workers)
    ) as pool:

        def start(value: Any, seed: int) -> Any:
            return pool.submit(_remote, _pickled(value, "an object of the space"), seed)

        def first(handles: list[Any]) -> Iterator[tuple[Any, Outcome]]:
            done = wait(handles, return_when=FIRST_COMPLETED).done
            for handle in handles:  # in the order of trials
                if handle in done:
                    try:
                        yield handle, handle.result()
                    except BrokenExecutor:
                        raise WorkerError(
                            "a worker process ended without a word (out of memory, or a script "
                            'without `if __name__ == "__main__":`); its trial is run again when '
                            "the search is resumed from its store"
                        ) from None

        try:
            yield _Futures(evaluation, start, first)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _on_ray(evaluation: Evaluation) -> Iterator[Pool]:
    try:
        import ray
    except ImportError:
        raise need("ray", "ray", "ray=True") from None
    errors: Any = ray.exceptions  # type: ignore[attr-defined]
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    task = ray.remote(_task)

    def start(value: Any, seed: int) -> Any:
        return task.remote(payload, value, seed)

    def first(handles: list[Any]) -> Iterator[tuple[Any, Outcome]]:
        done, _ = ray.wait(handles, num_returns=1)
        for handle in done:
            try:
                yield handle, ray.get(handle)
            except errors.RayTaskError as error:
                raise error.cause from None

    try:
        payload = ray.put(evaluation)  # once for all workers
        yield _Futures(evaluation, start, first)
    finally:
        if ours:
            ray.shutdown()


_loaded: list[Evaluation] = []


def _load(payload: bytes, workers: int) -> None:
    """Get a worker process ready; the processes share the processors."""
    import os
    import sys

    _loaded.append(pickle.loads(payload))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _remote(raw: bytes, seed: int) -> Outcome:
    return _loaded[0](lambda: pickle.loads(raw), seed)


def _task(evaluation: Evaluation, value: Any, seed: int) -> Outcome:
    return evaluation(lambda: value, seed)


def _pickled(value: Any, what: str) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise InputError(
            f"{what} can't be sent to other processes ({_told(error)}): define functions at the "
            "top of a module, or use workers=1"
        ) from None

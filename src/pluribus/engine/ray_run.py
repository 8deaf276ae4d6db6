"""Run a plan on a Ray cluster: the same plan, folds and bytes as threads on one machine.

Scheduling, folds' results, the journal and the output stay with the driver, in `Run`; each of its
threads hands spans to a worker process of its own, somewhere in the cluster, and writes what comes
back. Inputs must be readable under the same paths on every machine; the output need not be.
A worker that dies is replaced, and its span is done again.
"""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from pluribus.core.errors import PluribusError, need
from pluribus.engine.plan import Job, Plan
from pluribus.engine.run import Progress, Run, Sink
from pluribus.engine.spans import Done, Task, Worker, single_threaded

TRIES = 3  # workers that may die over one span


class RayRun:
    """As `Run`, on the cluster that `RAY_ADDRESS` names, the one in use, or a local one.

    `threads` bounds the workers (None: one a processor of the cluster, or one a GPU), `memory` the
    blocks in flight on each machine.
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
    ) -> None:
        ray = _ray()
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        found = ray.cluster_resources()
        slots = int(found.get("CPU" if device == "cpu" else "GPU", 0))
        nodes = sum(node["Alive"] for node in ray.nodes())
        handle: list[Any] = []

        def shared() -> Any:
            if not handle:
                handle.append(ray.put(plan))  # once for all workers
            return handle[0]

        def worker() -> Callable[[Task], Done]:
            return _Remote(plan, sink, shared, device, allow_nonfinite)

        self._run = Run(
            plan,
            sink,
            threads=max(1, min(threads or slots, slots)),
            memory=memory * nodes,
            worker=worker,
        )
        self.progress: Progress = self._run.progress

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Work until every block is in the sink. Raises as `Run.run` does."""
        try:
            self._run.run(on_progress)
        finally:
            if self._ours:
                _ray().shutdown()


class _Remote:
    """One worker process as a function of tasks; what it merged is written here."""

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        shared: Callable[[], Any],
        device: str,
        allow_nonfinite: bool,
    ) -> None:
        self.plan, self.sink, self.shared = plan, sink, shared
        self.device, self.allow_nonfinite = device, allow_nonfinite
        self.actor: Any = None

    def __call__(self, task: Task) -> Done:
        ray = _ray()
        for left in reversed(range(TRIES)):
            if self.actor is None:
                gpus = 0 if self.device == "cpu" else 1
                actor = ray.remote(_Actor).options(num_cpus=1, num_gpus=gpus)
                self.actor = actor.remote(self.shared(), self.device, self.allow_nonfinite)
            try:
                answer = ray.get(self.actor.execute.remote(task))
                break
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError:
                self.actor = None
                if not left:
                    raise
        if isinstance(answer, PluribusError):
            raise answer
        done, blocks = pickle.loads(answer[0]), answer[1]
        job = self.plan.jobs[task.job]
        for block, raw in blocks:
            self.sink.write(job, block, raw)
        return done


class _Actor:
    """What runs on the other side."""

    def __init__(self, plan: Plan, device: str, allow_nonfinite: bool) -> None:
        self._limits = single_threaded(plan)
        self._limits.__enter__()  # for as long as the process lives
        self._blocks: list[tuple[int, np.ndarray]] = []
        self._worker = Worker(plan, self._keep, device=device, allow_nonfinite=allow_nonfinite)

    def _keep(self, job: Job, block: int, raw: np.ndarray) -> None:
        self._blocks.append((block, raw.copy()))  # the worker uses its memory again

    def execute(self, task: Task) -> PluribusError | tuple[bytes, list[tuple[int, np.ndarray]]]:
        self._blocks = []
        try:
            done = self._worker(task)
            # As bytes: arrays of Ray's own are read-only, and states are joined in place.
            return pickle.dumps(done), self._blocks
        except PluribusError as error:
            return error  # as a value: raised, Ray would wrap it in its own


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise need("ray", "ray", "--ray") from None
    return ray

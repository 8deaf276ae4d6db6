"""Seeds of claims measured by several processes, each of which keeps what it found."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def beside(
    names: Sequence[str], seeds: Sequence[int], kept: Path, jobs: int, on_step: Any = None
) -> Iterator[Callable[[str], None]]:
    """Measure all seeds of all claims, `jobs` at a time, into the folder of kept figures.

    Yields what waits until all seeds of a claim are there, and raises what measuring them raised;
    WorkerError if a process ended without a word. What the others have kept by then stays. With one
    job nothing is measured here.
    """
    if jobs == 1:
        yield lambda name: None
        return
    from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
    from multiprocessing import active_children, get_context

    # Threads that wait for each other in a loop would take the other processes' time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    others = {child.pid for child in active_children()}
    # Spawned, not forked: a fork after torch has used its threads hangs.
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=_begin, initargs=(jobs,)
    ) as pool:
        waiting = {
            name: [pool.submit(_measure, name, seed, kept) for seed in seeds] for name in names
        }

        def wait(name: str) -> None:
            for done, future in enumerate(waiting[name], 1):
                future.result()
                if on_step is not None:
                    on_step(f"{name}: seeds", done, len(seeds))

        try:
            yield wait
        except BaseException as error:
            for child in active_children():
                if child.pid not in others:
                    child.terminate()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenExecutor):
                from pluribus.search.execute import WorkerError

                raise WorkerError(
                    "a process that measured a seed ended without a word (out of memory?); give "
                    "fewer --jobs. Seeds that were done are kept"
                ) from None
            raise


def _begin(jobs: int) -> None:
    """Get a process ready: it shares the processors, and its parent ends it."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _measure(name: str, seed: int, kept: Path) -> None:
    from pluribus import claims

    claims.run(name, [seed], kept=kept)

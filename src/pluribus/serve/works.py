"""Answers that need a thread of their own: composites that call models as often as they like.

`Works` stands where a model has its `Engine`; a `Job` where it has an `Ask`.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pluribus.core.errors import FormatError, NetworkError
from pluribus.serve.engine import Counts
from pluribus.serve.errors import ApiError
from pluribus.serve.prompts import Messages
from pluribus.serve.text import Stops
from pluribus.serve.writing import Done, Event, Failed, Piece

log = logging.getLogger("pluribus.serve")


class Left(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Job:
    """One answer that is wanted of a composite."""

    said: Messages | str  # a conversation, or a text to go on from
    max_tokens: int  # of one writer's text
    send: Callable[[Event], None]
    temperature: float | None = None  # None: the composite's own
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    loop: Any = None  # the server's, on which endpoints are asked
    cancelled: bool = False
    written: int = 0  # tokens drawn for it so far, by all
    read: int | None = None  # tokens of the prompt, where only an endpoint knows
    _held: list[Callable[[], Any]] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def fixed(self) -> bool:
        """Whether the answer is to be the same each time: temperature (or top_p) 0."""
        return self.temperature == 0 or self.top_p == 0

    def cancel(self) -> None:
        """Stop what is done for it, all that it asked others for included."""
        with self._lock:
            self.cancelled = True
            held, self._held = self._held, []
        for stop in held:
            stop()

    def hold(self, stop: Callable[[], Any]) -> None:
        """Have `stop` called if the job is cancelled. Raises Left if it is already."""
        with self._lock:
            if not self.cancelled:
                self._held.append(stop)
                return
        stop()
        raise Left

    def drop(self, stop: Callable[[], Any]) -> None:
        """Forget what `hold` was given."""
        with self._lock:
            self._held = [one for one in self._held if one is not stop]

    def tell(self, text: str, finished: bool, thought: int = 0) -> None:
        """Send the answer, cut at the first stop text. `thought`: tokens that it does not show."""
        stops = Stops(self.stop)
        shown, stop = stops.put(text)
        if stop is None:
            shown += stops.end()
        if shown:
            self.send(Piece(shown))
        reason = "stop" if finished or stop is not None else "length"
        self.send(Done(reason, self.written, thought=thought, read=self.read))


class Works:
    """Does jobs, `threads` at a time, in the order in which they came."""

    def __init__(self, name: str, solve: Callable[[Job], None], threads: int) -> None:
        self.counts = Counts()
        self.batches = threads > 1
        self.dead: BaseException | None = None
        self._solve = solve
        self._jobs: set[Job] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"pluribus {name}")

    def submit(self, job: Job) -> None:
        """Queue a job; its events follow. Raises RuntimeError once this is closed."""
        with self._lock:
            self._pool.submit(self._do, job)
            self._jobs.add(job)
            self.counts.waiting += 1

    def close(self) -> None:
        """Cancel what runs and what waits, and end the threads."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        self._pool.shutdown()

    def _do(self, job: Job) -> None:
        with self._lock:
            self.counts.waiting -= 1
            self.counts.running += 1
        try:
            if job.cancelled:
                raise Left
            self._solve(job)
        except (Left, CancelledError):  # the latter of a call to a model that was closed
            job.send(Done("cancelled", job.written))
        except (NetworkError, FormatError) as error:  # an endpoint's, not the client's
            job.send(Failed(ApiError(502, str(error))))
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("an answer failed")
            job.send(Failed(error))
        finally:
            with self._lock:
                self.counts.running -= 1
                self._jobs.discard(job)

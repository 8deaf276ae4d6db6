"""From a model's thread to the event loop: the events of one request's answers, as they come."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pluribus.serve.engine import Engine
from pluribus.serve.errors import ApiError, told
from pluribus.serve.works import Job, Works
from pluribus.serve.writing import Ask, Done, Event, Failed, Piece, Thought

BUFFERED = 1 << 13  # pieces of text that wait for a client before it is given up


class Flow:
    """Events of several answers in one queue; made on the event loop that reads it.

    A reader that falls too far behind loses the answer, so that the queue does not grow for ever.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.full = False
        self._asks: list[Ask | Job] = []

    def sender(self, index: int) -> Callable[[Event], None]:
        """Return what a model's thread calls with the events of answer `index`."""

        def send(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._put, index, event)
            except RuntimeError:
                if not self._loop.is_closed():  # else nobody is left to tell
                    raise

        return send

    def _put(self, index: int, event: Event) -> None:
        text = isinstance(event, Piece | Thought)
        if text and self._queue.qsize() >= BUFFERED:
            self.full = True
            self.cancel()
        if not (text and self.full):
            self._queue.put_nowait((index, event))

    def start(self, engine: Engine | Works, asks: Sequence[Any]) -> None:
        """Let a model write. Raises ApiError 503 if it is closed."""
        self._asks = list(asks)
        for ask in asks:
            try:
                engine.submit(ask)
            except RuntimeError:
                self.cancel()
                raise ApiError(
                    503, "the model has stopped; ask again later", retry_after=5
                ) from None

    def cancel(self) -> None:
        """Let all answers leave their batch; those that are done don't mind."""
        for ask in self._asks:
            ask.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield events until all answers are done. Raises what the model raised, or ApiError."""
        left = len(self._asks)
        while left:
            index, event = await self._queue.get()
            if isinstance(event, Failed):
                raise told(event.error)
            if isinstance(event, Done) and event.reason == "cancelled":
                if self.full:
                    raise ApiError(503, "the answer was cut off: the client reads too slowly")
                raise ApiError(503, "the answer was cut off: the server is stopping", retry_after=5)
            yield index, event
            left -= isinstance(event, Done)

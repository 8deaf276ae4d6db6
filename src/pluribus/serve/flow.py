"""From a model's thread to the event loop: the events of one request's answers, as they come."""

import asyncio
from collections.abc import AsyncIterator, Callable

from pluribus.serve.engine import Engine
from pluribus.serve.errors import ApiError
from pluribus.serve.writing import Ask, Done, Event, Failed


class Flow:
    """Events of several answers in one queue; made on the event loop that reads it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._asks: list[Ask] = []

    def sender(self, index: int) -> Callable[[Event], None]:
        """Return what a model's thread calls with the events of answer `index`."""

        def send(event: Event) -> None:
            if not self._loop.is_closed():  # nobody is left to tell
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return send

    def start(self, engine: Engine, asks: list[Ask]) -> None:
        """Let a model write. Raises ApiError 503 if it is closed."""
        self._asks = asks
        for ask in asks:
            try:
                engine.submit(ask)
            except RuntimeError:
                self.cancel()
                raise ApiError(
                    503, "the model is stopping; ask again later", retry_after=5
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
                raise event.error
            if isinstance(event, Done) and event.reason == "cancelled":
                raise ApiError(503, "the answer was cut off: the server is stopping", retry_after=5)
            yield index, event
            left -= isinstance(event, Done)

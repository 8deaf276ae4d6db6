"""Connections: how many there may be, and how long one may keep the server waiting.

    a request's head     `read_seconds` from the connection, or from its first byte on one kept open
    a request's body     `read_seconds`; the application reads it
    an answer            `write_seconds` in which the client takes nothing of what is ready
    idle connections     the oldest makes room for a new one at `max_connections`

uvicorn closes connections that are kept open and silent between requests after five seconds.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pluribus.serve.config import Limits
from pluribus.serve.errors import ApiError


class Doors:
    """All connections of one server; call it for a new one's protocol, as uvicorn does."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open: dict[Door, None] = {}  # the oldest first

    def __call__(self, **given: Any) -> "Door":
        """Return the protocol of a new connection."""
        return Door(self, **given)

    def enter(self, new: "Door") -> bool:
        """Count a connection in. Returns False if there is no room, nor an idle one to close."""
        if len(self.open) >= self.limits.max_connections:
            idle = next((one for one in self.open if one.idle), None)
            if idle is None:
                return False
            self.leave(idle)
            idle.transport.abort()
        self.open[new] = None
        return True

    def leave(self, one: "Door") -> None:
        """Count a connection out."""
        self.open.pop(one, None)


class Door(H11Protocol):
    """One connection. What is added to uvicorn's protocol is clocks; what it does is its own."""

    def __init__(self, doors: Doors, **given: Any) -> None:
        super().__init__(**given)
        self.doors = doors
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:  # type: ignore[override]
        """Take it in, or turn it away."""
        super().connection_made(transport)
        if self.doors.enter(self):
            self._watch()
        else:
            self._last(ApiError(503, "there are too many connections; ask again later"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Let it go."""
        self.doors.leave(self)
        self._reading = _stopped(self._reading)
        self._writing = _stopped(self._writing)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; a request that has begun has to come to its end in time."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on to the next request, which may have come in part."""
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._watch()

    def pause_writing(self) -> None:
        """Wait for a client that takes nothing, for so long."""
        super().pause_writing()
        if self._writing is None:
            wait = self.doors.limits.write_seconds
            self._writing = self.loop.call_later(wait, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it reads again."""
        self._writing = _stopped(self._writing)
        super().resume_writing()

    def _watch(self) -> None:
        """Start the clock of a request's head, once, and stop it when it is there."""
        if not self.idle or self.transport.is_closing():
            self._reading = _stopped(self._reading)
        elif self._reading is None:
            self._reading = self.loop.call_later(self.doors.limits.read_seconds, self._late)

    def _late(self) -> None:
        self._reading = None
        if not self.idle or self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:  # of a request that was answered already
            self.transport.close()
            return
        self._last(ApiError(408, "the request did not arrive in time"))

    def _last(self, error: ApiError) -> None:
        """Tell an error and close."""
        body = json.dumps(error.body()).encode()
        head = (
            f"HTTP/1.1 {error.status} {'Request Timeout' if error.status == 408 else 'Busy'}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _stopped(clock: asyncio.TimerHandle | None) -> None:
    if clock is not None:
        clock.cancel()

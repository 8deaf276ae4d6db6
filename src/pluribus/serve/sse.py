"""Answers as server-sent events, and noticing that nobody reads them any more."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

END = "data: [DONE]\n\n"


class Stream(StreamingResponse):
    """Server-sent events; `closing` is called once, however the answer ends."""

    def __init__(self, content: AsyncIterator[str], closing: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.closing = closing

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.closing()


def line(told: Any) -> str:
    """Return one event."""
    return f"data: {json.dumps(told)}\n\n"


async def gone(request: Request, then: Callable[[], Any]) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    then()

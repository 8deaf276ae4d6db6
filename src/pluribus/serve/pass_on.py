"""Requests for endpoints: passed on as they are within the limits, answers passed back."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from pluribus.serve import protocol
from pluribus.serve.errors import ApiError
from pluribus.serve.prepare import asked_tokens, check_count
from pluribus.serve.remote import Remote
from pluribus.serve.sse import END, Stream, gone, line

if TYPE_CHECKING:
    from pluribus.serve.app import Api, Visit

log = logging.getLogger("pluribus.serve")
AHEAD = 64  # chunks that are read before the client takes them


async def pass_on(
    api: "Api", request: Request, visit: "Visit", one: Remote, body: Any, raw: dict[str, Any]
) -> Response:
    """Return the endpoint's answer. Raises ApiError as it says."""
    if not isinstance(body, protocol.Embedding):
        check_count(body, api.limits)
        asked_tokens(body, api.limits)
        if body.stream:
            return await _streamed(api, request, visit, one, raw)
    got = await _unless_left(api, request, visit, one.ask(visit.endpoint, raw))
    _count(api, visit.model, got)
    return JSONResponse(got)


async def _unless_left(api: "Api", request: Request, visit: "Visit", what: Any) -> Any:
    """Wait for something that is given up when the client leaves, or the server stops."""
    asking = asyncio.ensure_future(what)
    left = False

    def leave() -> None:
        nonlocal left
        left = asking.cancel()

    def cut() -> None:
        asking.cancel()

    api.running.add(cut)
    watch = asyncio.create_task(gone(request, leave))
    try:
        return await asking
    except asyncio.CancelledError:
        if left:
            api.metrics.left(visit.model)
        raise ApiError(503, "cut off: the server stops, or the client left") from None
    finally:
        watch.cancel()
        asking.cancel()
        api.running.discard(cut)


class _Pump:
    """Reads an endpoint's stream in a task of its own, a little ahead of the client."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]]) -> None:
        self.queue: asyncio.Queue[dict[str, Any] | ApiError | None] = asyncio.Queue(AHEAD)
        self.cut_off = False
        self._task = asyncio.create_task(self._run(chunks))

    async def _run(self, chunks: AsyncIterator[dict[str, Any]]) -> None:
        last: ApiError | None = None
        try:
            async for chunk in chunks:
                await self.queue.put(chunk)
        except ApiError as error:
            last = error
        await self.queue.put(last)

    async def next(self) -> dict[str, Any] | None:
        """Return the next chunk, or None after the last. Raises ApiError for what went wrong."""
        found = await self.queue.get()
        if self.cut_off:
            raise ApiError(503, "the answer was cut off: the server is stopping", retry_after=5)
        if isinstance(found, ApiError):
            raise found
        return found

    def cut(self) -> None:
        """Stop, and say so to who waits."""
        self.cut_off = True
        self.close()
        if self.queue.empty():
            self.queue.put_nowait(None)

    def close(self) -> None:
        """Leave the endpoint."""
        self._task.cancel()


async def _streamed(
    api: "Api", request: Request, visit: "Visit", one: Remote, raw: dict[str, Any]
) -> Response:
    pump = _Pump(one.stream(visit.endpoint, raw))
    try:  # so that what is refused has its own status
        first = await _unless_left(api, request, visit, pump.next())
    except BaseException:
        pump.close()
        raise
    visit.first()
    ended = False

    async def lines() -> AsyncIterator[str]:
        nonlocal ended
        chunk = first
        try:
            while chunk is not None:
                _count(api, visit.model, chunk)
                yield line(chunk)
                chunk = await pump.next()
        except ApiError as error:
            ended = True
            log.warning("the stream of %s broke off: %s", one.name, error.message)
            api.metrics.broke(visit.model)
            yield line(error.body())
            return
        ended = True
        yield END

    def closing() -> None:
        pump.close()
        api.running.discard(pump.cut)
        visit.end(200)
        if not ended:
            api.metrics.left(visit.model)

    api.running.add(pump.cut)
    return Stream(lines(), closing)


def _count(api: "Api", model: str, answer: dict[str, Any]) -> None:
    """Count the tokens that an endpoint tells of, as far as they are numbers."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if isinstance(read, int) and isinstance(written, int) and read >= 0 and written >= 0:
        api.metrics.tokens(model, read, written)

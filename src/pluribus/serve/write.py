"""How a request is answered: whole or streamed, by a model here or by an endpoint."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from pluribus.core.errors import PluribusError
from pluribus.serve import protocol
from pluribus.serve.composed import Composed
from pluribus.serve.errors import ApiError, wrong
from pluribus.serve.pass_on import pass_on
from pluribus.serve.prepare import Prepared, of_composite, of_model
from pluribus.serve.remote import Remote
from pluribus.serve.served import Served
from pluribus.serve.sse import END, Stream, gone, line

if TYPE_CHECKING:
    from pluribus.serve.app import Api, Visit

log = logging.getLogger("pluribus.serve")
Member = Served | Composed | Remote


class Writer:
    """Answers requests."""

    def __init__(self, api: "Api") -> None:
        self.api = api

    async def __call__(
        self,
        request: Request,
        visit: "Visit",
        one: Member,
        body: Any,
        raw: dict[str, Any],
    ) -> Response:
        """Return the answer; a `Stream` ends the visit itself. Raises ApiError."""
        if isinstance(one, Remote):
            return await pass_on(self.api, request, visit, one, body, raw)
        if isinstance(body, protocol.Embedding):
            return JSONResponse(await self.api.embed(request, one, body))
        if isinstance(one, Served):
            if not one.writes:
                raise wrong(
                    f"the model {one.name!r} only makes embeddings; ask /v1/embeddings", "model"
                )
            made = await of_model(one, body, self.api.limits)
        else:
            made = await of_composite(one, body, self.api.limits)
        made.flow.start(one.engine, made.asks)
        if body.stream:
            return self._streamed(visit, one, body, made)
        return await self._whole(request, visit, one, made)

    async def _whole(
        self, request: Request, visit: "Visit", one: Served | Composed, made: Prepared
    ) -> Response:
        self.api.running.add(made.flow.cancel)
        watch = asyncio.create_task(gone(request, made.flow.cancel))
        waited = True
        try:
            async for index, event in made.flow.events():
                if waited:
                    visit.first()
                    waited = False
                made.answer.choices[index].take(event)
        except Exception as error:
            made.flow.cancel()
            raise _told(error) from error
        finally:
            self.api.running.discard(made.flow.cancel)
            left = watch.done()
            watch.cancel()
            self._count(one, made, left)
        return JSONResponse(made.answer.whole(made.read))

    def _streamed(
        self, visit: "Visit", one: Served | Composed, body: Any, made: Prepared
    ) -> Response:
        self.api.running.add(made.flow.cancel)
        ended = False

        async def lines() -> AsyncIterator[str]:
            nonlocal ended
            opened: set[int] = set()
            try:
                async for index, event in made.flow.events():
                    choice = made.answer.choices[index]
                    choice.take(event)
                    if index not in opened:
                        if not opened:
                            visit.first()
                        opening = made.answer.opening(choice)
                        opened.add(index)
                        if opening is not None:
                            yield _line(opening, body.with_usage)
                    if (chunk := made.answer.chunk(choice, event)) is not None:
                        yield _line(chunk, body.with_usage)
                    choice.forget()
            except Exception as error:
                made.flow.cancel()
                ended = True
                if not isinstance(error, ApiError):  # of which there is nothing more to know
                    log.warning("a stream of %s broke off: %s", one.name, error)
                self.api.metrics.broke(one.name)
                yield line(_told(error).body())
                return
            if body.with_usage:
                yield line(made.answer.closing(made.read))
            ended = True
            yield END

        def closing() -> None:
            made.flow.cancel()
            self.api.running.discard(made.flow.cancel)
            visit.end(200)
            self._count(one, made, not ended)

        return Stream(lines(), closing)

    def _count(self, one: Served | Composed, made: Prepared, left: bool) -> None:
        usage = made.answer.usage(made.read)
        self.api.metrics.tokens(one.name, usage["prompt_tokens"], usage["completion_tokens"])
        if left:
            self.api.metrics.left(one.name)


def _line(chunk: dict[str, Any], usage: bool) -> str:
    if usage:
        chunk["usage"] = None
    return line(chunk)


def _told(error: Exception) -> ApiError:
    """Return what a client is told of an error: what it can mend as 400, the rest as 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PluribusError):
        return wrong(str(error))
    return ApiError(500, f"the model failed: {type(error).__name__}")

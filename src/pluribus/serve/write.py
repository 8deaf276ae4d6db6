"""How a request is answered: whole or streamed, by a model here or by an endpoint."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pluribus.core.errors import PluribusError
from pluribus.serve import prompts, protocol
from pluribus.serve.answers import Answer, Choice
from pluribus.serve.config import Limits
from pluribus.serve.errors import ApiError, wrong
from pluribus.serve.flow import Flow
from pluribus.serve.remote import Remote
from pluribus.serve.sampling import Sampling
from pluribus.serve.served import Served
from pluribus.serve.writing import Ask

if TYPE_CHECKING:
    from pluribus.serve.app import Api, Visit

log = logging.getLogger("pluribus.serve")
SHORT = 16  # tokens of a completion without max_tokens, as OpenAI's


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


class Prepared:
    """A request read by its model: what is asked for, and how much was read."""

    def __init__(self, answer: Answer, asks: list[Ask], flow: Flow, read: int) -> None:
        self.answer, self.asks, self.flow, self.read = answer, asks, flow, read


class Writer:
    """Answers requests."""

    def __init__(self, api: "Api") -> None:
        self.api = api

    async def __call__(
        self,
        request: Request,
        visit: "Visit",
        one: Served | Remote,
        body: Any,
        raw: dict[str, Any],
    ) -> Response:
        """Return the answer; a `Stream` ends the visit itself. Raises ApiError."""
        if isinstance(one, Remote):
            return await self._pass_on(request, visit, one, body, raw)
        if isinstance(body, protocol.Embedding):
            return JSONResponse(await self.api.embed(one, body))
        if not one.writes:
            raise wrong(
                f"the model {one.name!r} only makes embeddings; ask /v1/embeddings", "model"
            )
        made = await self._prepared(one, body)
        made.flow.start(one.engine, made.asks)
        if body.stream:
            return self._streamed(visit, one, body, made)
        return await self._whole(request, visit, one, made)

    # -- models here -------------------------------------------------------------------------------

    async def _prepared(self, one: Served, body: protocol.Chat | protocol.Completion) -> Prepared:
        n = body.n or 1
        if isinstance(body, protocol.Chat):
            said = [{"role": m.role, "content": m.content} for m in body.messages]
            read = [await asyncio.to_thread(prompts.of_messages, one.model, one.tokenizer, said)]
            texts: list[str | None] = [None]
            kind = "chat"
            if body.top_logprobs is not None and not body.logprobs:
                raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
            count = (body.top_logprobs or 0) if body.logprobs else None
            echo = False
        else:
            if body.best_of not in (None, n):
                raise wrong("best_of other than n is not supported here", "best_of")
            read = [
                await asyncio.to_thread(prompts.of_text, one.model, one.tokenizer, p)
                for p in body.prompt
            ]
            kind, count, echo = "text", body.logprobs, bool(body.echo)
            texts = [None] * len(read)
            if echo:
                texts = [_text(one, p) for p in body.prompt]
        if (total := len(read) * n) > self.api.limits.max_choices:
            raise wrong(
                f"{total} answers are asked for in one request; at most "
                f"{self.api.limits.max_choices} are written",
                "n",
            )
        flow = Flow()
        asks, choices = [], []
        for (ids, inputs, stop), text in zip(read, texts, strict=True):
            if echo and "member_inputs" in inputs and count is not None:
                raise wrong(
                    "members of this model read prompts of their own, so the prompt has no common "
                    "log-probabilities; leave echo or logprobs out",
                    "echo",
                )
            longest = max(
                [len(ids)]
                + [int(m["input_ids"].shape[1]) for m in inputs.get("member_inputs", {}).values()]
            )
            check_ids(one, ids, self.api.limits, "messages" if kind == "chat" else "prompt")
            most = self._most(one, body, longest)
            for _ in range(n):
                index = len(asks)
                seed = None if body.seed is None else (body.seed + index) % (1 << 63)
                sampling = Sampling(
                    max_tokens=most,
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=seed,
                    ignore_end=bool(body.ignore_eos),
                )
                scored = echo and count is not None
                asks.append(
                    Ask(
                        ids,
                        sampling,
                        flow.sender(index),
                        (*body.stops, *stop),
                        count,
                        scored,
                        inputs,
                        one.part,
                    )
                )
                choices.append(Choice(index, ids, text, count))
        total_read = sum(len(ids) for ids, _, _ in read)
        answer = Answer(kind, one.name, one.tokenizer, choices)
        return Prepared(answer, asks, flow, total_read)

    def _most(self, one: Served, body: protocol.Chat | protocol.Completion, read: int) -> int:
        """Return how many tokens may be written. Raises ApiError if they have no room."""
        limit = self.api.limits.max_new_tokens
        asked = body.max_tokens
        name = "max_tokens"
        if isinstance(body, protocol.Chat) and body.max_completion_tokens is not None:
            asked, name = body.max_completion_tokens, "max_completion_tokens"
        room = None if one.room is None else one.room - read
        if asked is None:
            asked = SHORT if isinstance(body, protocol.Completion) else limit
            asked = min(asked, limit) if room is None else max(1, min(asked, limit, room))
        if asked > limit:
            raise wrong(f"{name} is {asked}; at most {limit} tokens are written", name)
        if room is not None and asked > room:
            raise wrong(
                f"{read} tokens of a prompt and {asked} new ones are more than the {one.room} that "
                f"{one.name!r} takes; send a shorter prompt or a smaller {name}",
                "messages" if isinstance(body, protocol.Chat) else "prompt",
                "context_length_exceeded",
            )
        return asked

    async def _whole(
        self, request: Request, visit: "Visit", one: Served, made: Prepared
    ) -> Response:
        self.api.running.add(made.flow.cancel)
        watch = asyncio.create_task(_gone(request, made.flow.cancel))
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

    def _streamed(self, visit: "Visit", one: Served, body: Any, made: Prepared) -> Response:
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
                    choice.pieces.clear()  # told, and not needed again
            except Exception as error:
                made.flow.cancel()
                ended = True
                if not isinstance(error, ApiError):  # of which there is nothing more to know
                    log.warning("a stream of %s broke off: %s", one.name, error)
                yield f"data: {json.dumps(_told(error).body())}\n\n"
                return
            if body.with_usage:
                yield f"data: {json.dumps(made.answer.closing(made.read))}\n\n"
            ended = True
            yield "data: [DONE]\n\n"

        def closing() -> None:
            made.flow.cancel()
            self.api.running.discard(made.flow.cancel)
            visit.end(200)
            self._count(one, made, not ended)

        return Stream(lines(), closing)

    def _count(self, one: Served, made: Prepared, left: bool) -> None:
        written = sum(c.done.written for c in made.answer.choices if c.done is not None)
        self.api.metrics.tokens(one.name, made.read, written)
        if left:
            self.api.metrics.left(one.name)

    # -- endpoints ---------------------------------------------------------------------------------

    async def _pass_on(
        self, request: Request, visit: "Visit", one: Remote, body: Any, raw: dict[str, Any]
    ) -> Response:
        if not getattr(body, "stream", None):
            asking = asyncio.create_task(one.ask(visit.endpoint, raw))
            self.api.running.add(asking.cancel)  # type: ignore[arg-type]
            watch = asyncio.create_task(_gone(request, asking.cancel))
            try:
                return JSONResponse(await asking)
            except asyncio.CancelledError:
                raise ApiError(503, "cut off: the server stops, or the client left") from None
            finally:
                watch.cancel()
                self.api.running.discard(asking.cancel)  # type: ignore[arg-type]
        chunks = one.stream(visit.endpoint, raw)
        first = await anext(chunks, None)  # so that what is refused has its own status

        async def lines() -> AsyncIterator[str]:
            try:
                if first is not None:
                    yield f"data: {json.dumps(first)}\n\n"
                async for chunk in chunks:
                    yield f"data: {json.dumps(chunk)}\n\n"
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield f"data: {json.dumps(error.body())}\n\n"
            finally:
                await chunks.aclose()  # type: ignore[attr-defined]

        return Stream(lines(), lambda: visit.end(200))


def check_ids(one: Served, ids: Sequence[int], limits: Limits, param: str) -> None:
    """Raise ApiError for a prompt without tokens, too many, or ids that are no token."""
    if not ids:
        raise wrong(f"the tokenizer of {one.name!r} makes no tokens of an empty text", param)
    most = min(limits.max_prompt_tokens, one.room or limits.max_prompt_tokens)
    if len(ids) > most:
        raise wrong(
            f"the prompt has {len(ids)} tokens; {one.name!r} takes {most}",
            param,
            "context_length_exceeded",
        )
    if (bad := next((i for i in ids if not 0 <= i < one.vocabulary), None)) is not None:
        raise wrong(f"{bad} is no token: ids are 0 to {one.vocabulary - 1}", param)


def _text(one: Served, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    check = [i for i in prompt if 0 <= i < one.vocabulary]
    return one.tokenizer.decode(check, clean_up_tokenization_spaces=False)


async def _gone(request: Request, then: Callable[[], Any]) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    then()


def _line(chunk: dict[str, Any], usage: bool) -> str:
    if usage:
        chunk["usage"] = None
    return f"data: {json.dumps(chunk)}\n\n"


def _told(error: Exception) -> ApiError:
    """Return what a client is told of an error: what it can mend as 400, the rest as 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PluribusError):
        return wrong(str(error))
    return ApiError(500, f"the model failed: {type(error).__name__}")

"""The application: OpenAI's routes over models that run here or elsewhere."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pluribus.core.errors import nearest
from pluribus.serve import answers, protocol
from pluribus.serve.config import Limits
from pluribus.serve.describe import describe, documented
from pluribus.serve.errors import ApiError, stopping
from pluribus.serve.gate import Gate
from pluribus.serve.metrics import Metrics
from pluribus.serve.prepare import check_ids
from pluribus.serve.remote import Remote
from pluribus.serve.served import Served
from pluribus.serve.sse import Stream
from pluribus.serve.write import Member, Writer

Members = Mapping[str, Member]


class Api:
    """What all routes share."""

    def __init__(self, members: Members, limits: Limits, gate: Gate) -> None:
        self.members, self.limits, self.gate = dict(members), limits, gate
        self.metrics = Metrics(self.members)
        self.running: set[Callable[[], None]] = set()  # what cuts a request off

    def member(self, name: str) -> Member:
        """Return a model by its name. Raises ApiError 404 with the nearest name."""
        if name not in self.members:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; there are: {', '.join(self.members)}."
                f"{nearest(name[:100], self.members)}",
                param="model",
                code="model_not_found",
            )
        return self.members[name]

    def card(self, name: str) -> dict[str, Any]:
        """Return what lists say of a model."""
        one = self.member(name)
        owner = one.endpoint.host if isinstance(one, Remote) else "pluribus"
        return {"id": name, "object": "model", "created": one.created, "owned_by": owner}

    async def body(self, request: Request) -> bytes:
        """Read a request's body. Raises ApiError 413, 415, or 408 from a client that is slow."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # pages of other sites cannot send it unasked
            raise ApiError(415, "send JSON, with the header 'Content-Type: application/json'")
        most = self.limits.max_body_bytes
        large = ApiError(413, f"the body is larger than {most} bytes; send a smaller one")
        told = request.headers.get("content-length", "")
        if told.isdigit() and int(told) > most:
            raise large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise large
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time") from None
        return b"".join(parts)

    async def embed(
        self, request: Request, one: Member, body: protocol.Embedding
    ) -> dict[str, Any]:
        """Return embeddings, made in portions between two tokens of others.

        Raises ApiError for a model that has none, too many texts, or a client that has left.
        """
        if not isinstance(one, Served) or not one.embeds:
            raise ApiError(
                400, f"the model {one.name!r} makes no embeddings: it has no one hidden state"
            )
        if len(body.input) > protocol.INPUTS:
            raise ApiError(
                400,
                f"{len(body.input)} texts are given; at most {protocol.INPUTS} are taken",
                param="input",
            )
        rows = await asyncio.to_thread(_ids, one.tokenizer, body.input)
        for row in rows:
            check_ids(one, row, self.limits, "input")
        vectors: list[list[float]] = [[] for _ in rows]
        for some in one.portions(rows):
            if await request.is_disconnected():
                self.metrics.left(one.name)
                raise ApiError(503, "the client left")
            given = [rows[i] for i in some]
            made = await self._called(one, lambda given=given: one.embed(given))
            for i, vector in zip(some, made, strict=True):
                vectors[i] = vector
        if body.dimensions not in (None, len(vectors[0])):
            raise ApiError(
                400,
                f"embeddings of {one.name!r} have {len(vectors[0])} dimensions, and are not cut",
                param="dimensions",
            )
        tokens = sum(map(len, rows))
        self.metrics.tokens(one.name, tokens, 0)
        return answers.embeddings(one.name, vectors, tokens, body.encoding_format)

    async def _called(self, one: Served, work: Callable[[], Any]) -> Any:
        """Run something in a model's thread. Raises ApiError 503 if there is none any more."""
        try:
            return await asyncio.wrap_future(one.engine.call(work))
        except (RuntimeError, asyncio.CancelledError) as error:
            if one.engine.usable:
                raise
            raise stopping(one.name) from error


def _ids(tokenizer: Any, texts: Sequence[Any]) -> list[list[int]]:
    return [tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in texts]


class Visit:
    """One request: when it began, whose it is, and that it ends once."""

    def __init__(self, api: Api, endpoint: str) -> None:
        self.api, self.endpoint = api, endpoint
        self.begun = time.monotonic()
        self.model = ""
        self.inside = self.ended = False

    def end(self, status: int) -> None:
        """Count it, and let the next one in."""
        if self.ended:
            return
        self.ended = True
        if self.inside:
            self.api.gate.leave()
        seconds = time.monotonic() - self.begun
        self.api.metrics.answered(self.model, self.endpoint, status, seconds)

    def first(self) -> None:
        """Note that the first token is there."""
        self.api.metrics.first(self.model, time.monotonic() - self.begun)


def build(members: Members, limits: Limits | None = None, keys: tuple[str, ...] = ()) -> FastAPI:
    """Return the application. Its `state.api` holds what a server needs to stop it gracefully."""
    limits = limits or Limits()
    api = Api(members, limits, Gate(keys, limits.max_concurrent))
    writer = Writer(api)
    app = FastAPI(title="pluribus", docs_url=None, redoc_url=None)
    app.state.api = api
    _errors(app)

    async def asked(request: Request, kind: type[Any], endpoint: str) -> Response:
        visit = Visit(api, endpoint)
        try:
            api.gate.check(request.headers.get("authorization"))
            api.gate.enter()
            visit.inside = True
            body, raw = protocol.read(kind, await api.body(request))
            visit.model = body.model
            answer = await writer(request, visit, api.member(body.model), body, raw)
        except ApiError as error:
            visit.end(error.status)
            raise
        except BaseException:
            visit.end(500)
            raise
        if not isinstance(answer, Stream):  # which ends its visit itself
            visit.end(answer.status_code)
        return answer

    @app.post("/v1/chat/completions", **documented("ChatAnswer", request="Chat"))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await asked(request, protocol.Chat, "chat/completions")

    @app.post("/v1/completions", **documented("CompletionAnswer", request="Completion"))
    async def complete(request: Request) -> Response:
        """Go on from a text."""
        return await asked(request, protocol.Completion, "completions")

    @app.post("/v1/embeddings", **documented("EmbeddingAnswer", request="Embedding"))
    async def embed(request: Request) -> Response:
        """Return texts as vectors."""
        return await asked(request, protocol.Embedding, "embeddings")

    @app.get("/v1/models", **documented("Models"))
    async def models(request: Request) -> Response:
        """List the models."""
        api.gate.check(request.headers.get("authorization"))
        found = [api.card(name) for name in api.members]
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}", **documented("Model", 404))
    async def model(request: Request, name: str) -> Response:
        """Tell of one model."""
        api.gate.check(request.headers.get("authorization"))
        return JSONResponse(api.card(name))

    @app.get("/health", **documented("Health", 503, locked=False))
    async def health() -> Response:
        """Whether requests are taken, and what every model does."""
        told, dead = {}, []
        for name, one in api.members.items():
            if isinstance(one, Remote):
                continue
            engine = one.engine
            told[name] = {
                "batched": engine.batches,
                "running": engine.counts.running,
                "waiting": engine.counts.waiting,
            }
            if engine.dead is not None:
                told[name]["died"] = type(engine.dead).__name__
                dead.append(name)
        state = "stopping" if api.gate.closing else "failed" if dead else "ok"
        said: dict[str, Any] = {"status": state, "requests": api.gate.inside, "models": told}
        if dead:
            said["reason"] = f"the engine of {', '.join(dead)} has died; start the server anew"
        return JSONResponse(said, 200 if state == "ok" else 503)

    @app.get("/metrics", **documented(None))
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus."""
        api.gate.check(request.headers.get("authorization"))
        return Response(api.metrics.text(), media_type="text/plain; version=0.0.4")

    describe(app, api)
    return app


def _errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path[:100]}: {error.detail}"
        made = ApiError(error.status_code, said)
        return JSONResponse(made.body(), made.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        made = ApiError(500, f"internal error: {type(error).__name__}")
        return JSONResponse(made.body(), 500)

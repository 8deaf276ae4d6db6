"""The application: pages of the catalogue, runs, and reports."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import parse_qs

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from pluribus import catalogue
from pluribus.catalogue import meaning
from pluribus.core.errors import InputError, MissingError, OutputError, PluribusError, RecipeError
from pluribus.serve.errors import ApiError
from pluribus.ui import commands, pages
from pluribus.ui.guard import COOKIE, REPORT_POLICY, Guard, Guarded
from pluribus.ui.runs import Runner
from pluribus.ui.store import Store

LARGEST = 64 << 10  # bytes of a form
READ_SECONDS = 10.0
TICK_SECONDS = 0.15  # between looks at a run's log
MOST_COMPARED = 6
STATUS = {MissingError: 404, RecipeError: 404, InputError: 400, OutputError: 409}


class Site:
    """What all routes share."""

    def __init__(self, store: Store, runner: Runner, guard: Guard) -> None:
        self.store, self.runner, self.guard = store, runner, guard
        self.closing = False

    def page(self, request: Request, name: str, code: int = 200, /, **values: Any) -> HTMLResponse:
        """Render a page for a request."""
        session = request.state.session
        shared = {
            "token": self.guard.token(session),
            "locked": self.guard.gate.locked and bool(session),
            "path": request.url.path,
        }
        return HTMLResponse(pages.page(name, **shared, **values), code)

    async def form(self, request: Request) -> dict[str, str]:
        """Read a form that a page of ours sent. Raises HTTPException for any other."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            raise HTTPException(415, "send a form")
        body = b""
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > LARGEST:
                        raise HTTPException(413, f"a form has at most {LARGEST} bytes")
        except TimeoutError:
            raise HTTPException(408, "the form did not arrive in time") from None
        try:
            told = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=200)
        except ValueError:
            raise HTTPException(400, "the form cannot be read") from None
        values = {key: found[-1] for key, found in told.items()}
        if not self.guard.fits(request.state.session, values.pop("token", "")):
            raise HTTPException(403, "this form has grown old; open the page again and repeat it")
        return values


def build(store: Store, runner: Runner, guard: Guard) -> Guarded:
    """Return the guarded application; its `site` tells the server when it closes."""
    app = FastAPI(title="pluribus ui", docs_url=None, redoc_url=None, openapi_url=None)
    site = Site(store, runner, guard)
    _errors(app, site)
    _reading(app, site)
    _running(app, site)
    _entering(app, site)
    guarded = Guarded(app, guard)
    guarded.site = site  # type: ignore[attr-defined]
    return guarded


def found(query: Mapping[str, str]) -> dict[str, Any]:
    """Return the cards for a query string, and what it was. Raises InputError for odd filters."""
    for name, choices in pages.CHOICES.items():
        given = query.get(name, "")
        if given not in [value for value, _ in choices]:
            known = ", ".join(value for value, _ in choices if value)
            raise InputError(f"{name} is {given[:40]!r}; expected one of {known}")
    trains, state = query.get("trains"), query.get("state")
    filters = catalogue.Filters(
        data=query.get("data") or None,  # type: ignore[arg-type]
        trains={"yes": True, "no": False}.get(trains or ""),
        at=query.get("at") or None,  # type: ignore[arg-type]
        where=query.get("where") or None,  # type: ignore[arg-type]
        built={"built": True, "planned": False}.get(state or ""),
    )
    words = query.get("q", "")[:200]
    by_meaning = query.get("by") == "meaning" and meaning.installed()
    cards = catalogue.finder().search(words, filters, by_meaning)
    if not words.strip():  # what can be run comes first, and the systems before single methods
        cards.sort(key=lambda card: (not card.built, not card.system))
    return {"cards": cards, "query": query, "words": words, "all": len(catalogue.cards())}


def _reading(app: FastAPI, site: Site) -> None:
    """Pages that change nothing."""

    @app.get("/")
    def front(request: Request) -> Response:
        return site.page(
            request, "front.html", meaning=meaning.installed(), **found(request.query_params)
        )

    @app.get("/cards")
    def cards(request: Request) -> Response:
        return site.page(request, "cards.html", **found(request.query_params))

    @app.get("/card/{name}")
    def card(request: Request, name: str) -> Response:
        one = catalogue.card(name[:100])
        return site.page(request, "card.html", card=one, forms=commands.offered(one), fault="")

    @app.get("/compare")
    def compare(request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("c")))
        if len(names) > MOST_COMPARED:
            raise InputError(f"at most {MOST_COMPARED} cards fit side by side, not {len(names)}")
        cards = [catalogue.card(name[:100]) for name in names]
        header, rows = catalogue.compared(cards) if cards else ([], [])
        return site.page(request, "compare.html", cards=cards, header=header, rows=rows)

    @app.get("/runs")
    def runs(request: Request) -> Response:
        reports: dict[int, list[Any]] = {}
        for report in site.store.reports():
            reports.setdefault(report.run, []).append(report)
        return site.page(request, "runs.html", runs=site.store.runs(), reports=reports)

    @app.get("/runs/{number}")
    def run(request: Request, number: int) -> Response:
        one = site.store.run(number)
        return site.page(
            request,
            "run.html",
            run=one,
            lines=site.store.lines(number),
            progress=site.runner.progress(number),
            reports=site.store.reports(number),
            folder=site.runner.place(number),
        )

    @app.get("/runs/{number}/state")
    def state(number: int) -> Response:
        one = site.store.run(number)._asdict()
        reports = [report._asdict() for report in site.store.reports(number)]
        return JSONResponse({**one, "progress": site.runner.progress(number), "reports": reports})

    @app.get("/runs/{number}/events")
    async def events(number: int, after: int = 0) -> Response:
        site.store.run(number)
        return StreamingResponse(_told(site, number, after), media_type="text/event-stream")

    @app.get("/reports/{number}")
    def report(request: Request, number: int) -> Response:
        one, body = site.store.report(number)
        if one.kind == "html":
            return HTMLResponse(body, headers={"Content-Security-Policy": REPORT_POLICY})
        return site.page(request, "report.html", report=one, text=pages.pretty(body))

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        try:
            body, kind, _ = pages.static(name)
        except KeyError:
            raise HTTPException(404, "there is no such file") from None
        fresh = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(body, media_type=kind, headers=fresh)

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)


async def _told(site: Site, number: int, after: int) -> AsyncIterator[str]:
    """Yield a run's lines, its progress and its end as server-sent events."""
    shown = None
    while not site.closing:
        run = await anyio.to_thread.run_sync(site.store.run, number)
        lines = await anyio.to_thread.run_sync(site.store.lines, number, after)
        for line in lines:
            after = line.number
            yield f"event: line\ndata: {json.dumps(line._asdict())}\n\n"
        progress = site.runner.progress(number)
        if progress != shown:
            shown = progress
            yield f"event: progress\ndata: {json.dumps(progress)}\n\n"
        if run.status != "running":
            yield f"event: end\ndata: {json.dumps(run.status)}\n\n"
            return
        await asyncio.sleep(TICK_SECONDS)


def _running(app: FastAPI, site: Site) -> None:
    """Forms that start, end and forget runs."""

    @app.post("/runs")
    async def start(request: Request) -> Response:
        values = await site.form(request)
        form = pages.form_of(values.pop("form", ""))
        card = values.pop("card", "")
        title = f"{form.title} {values['claim']}" if "claim" in values else form.title
        try:
            number = await anyio.to_thread.run_sync(site.runner.start, form, values, title[:200])
        except (InputError, OutputError) as error:
            if not card:
                raise
            one = catalogue.card(card[:100])
            forms = [
                (each, values if each.name == form.name else given)
                for each, given in commands.offered(one)
            ]
            return site.page(
                request, "card.html", _status(error), card=one, forms=forms, fault=str(error)
            )
        return RedirectResponse(f"/runs/{number}", 303)

    @app.post("/runs/{number}/cancel")
    async def cancel(request: Request, number: int) -> Response:
        await site.form(request)
        await anyio.to_thread.run_sync(site.runner.cancel, number)
        return RedirectResponse(f"/runs/{number}", 303)

    @app.post("/runs/{number}/remove")
    async def remove(request: Request, number: int) -> Response:
        await site.form(request)
        await anyio.to_thread.run_sync(site.store.remove, number)
        return RedirectResponse("/runs", 303)


def _entering(app: FastAPI, site: Site) -> None:
    """The page for a key."""

    def entered(request: Request, status: int = 200, fault: str = "") -> Response:
        return site.page(
            request, "enter.html", status, fault=fault, next=request.query_params.get("next", "/")
        )

    @app.get("/enter")
    def ask(request: Request) -> Response:
        return entered(request)

    @app.post("/enter")
    async def enter(request: Request) -> Response:
        request.state.session = ""  # the page was made before there was one
        values = await site.form(request)
        try:
            session = site.guard.admit(values.get("key", ""))
        except ApiError:
            return entered(request, 401, "this key is not known here")
        after = values.get("next", "/")
        safe = after.startswith("/") and not after.startswith(("//", "/\\"))
        answer = RedirectResponse(after if safe else "/", 303)
        answer.set_cookie(COOKIE, session, httponly=True, samesite="strict", path="/")
        return answer


def _status(error: Exception) -> int:
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)


def _errors(app: FastAPI, site: Site) -> None:
    """Show errors as pages: what was given, what was expected, what to try."""

    def shown(request: Request, status: int, said: str) -> Response:
        return site.page(request, "error.html", status, status=status, said=said)

    @app.exception_handler(PluribusError)
    async def refused(request: Request, error: PluribusError) -> Response:
        return shown(request, _status(error), str(error))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return shown(request, error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def odd(request: Request, error: Exception) -> Response:
        return shown(request, 404, "there is no such page")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return shown(request, 500, f"internal error: {type(error).__name__}")

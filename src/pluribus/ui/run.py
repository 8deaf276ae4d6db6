"""Starting and stopping the pages' server; Ctrl-C ends every run it started."""

import os
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pluribus.core.errors import InputError
from pluribus.core.optional import optional
from pluribus.serve.run import address, bound, is_loopback

CLOSE_SECONDS = 2  # for open connections, once runs have ended


def default_store() -> Path:
    """Return $PLURIBUS_HOME/ui.sqlite, or the same in ~/.local/share/pluribus."""
    home = os.environ.get("PLURIBUS_HOME") or "~/.local/share/pluribus"
    return Path(home).expanduser() / "ui.sqlite"


def check_open(host: str, keys: tuple[str, ...]) -> None:
    """Raise InputError for an address that others reach, without a key."""
    if not keys and not is_loopback(host):
        raise InputError(
            f"{host} can be reached from other machines, and there is no key; add --key-env "
            "VARIABLE with a key in it, or bind 127.0.0.1"
        )


@contextmanager
def prepared(
    host: str, port: int, keys: tuple[str, ...], store: Path, cwd: Path
) -> Iterator[tuple[Any, Any, str]]:
    """Give a server, its socket and its address; at the end all runs are over.

    Raises what opening the store raises, InputError for an open address without keys, OutputError
    for one that is taken.
    """
    for package in ("fastapi", "uvicorn", "jinja2"):
        optional(package, "serve", "the catalogue in a browser")
    from pluribus.ui.store import Store

    check_open(host, keys)
    listening = bound(host, port)
    try:
        url = address(listening).removesuffix("/v1")
        kept = Store.open(store)
        try:
            from pluribus.ui.app import build  # the catalogue: what is refused is refused before
            from pluribus.ui.guard import Guard
            from pluribus.ui.runs import Runner

            runner = Runner(kept, kept.path.parent / f"{kept.path.stem}-runs", cwd)
            app = build(kept, runner, Guard(host, listening.getsockname()[1], keys))
            try:
                yield _server(app), listening, url
            finally:
                runner.close()
        finally:
            kept.close()
    finally:
        listening.close()


def _server(app: Any) -> Any:
    uvicorn = optional("uvicorn", "serve", "the catalogue in a browser")

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            """Close the streams of pages that watch a run, then stop; a second signal is harder."""
            self.force_exit = app.site.closing
            app.site.closing = self.should_exit = True

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    return Server(config)


def serve(
    host: str = "127.0.0.1",
    port: int = 0,
    keys: tuple[str, ...] = (),
    store: Path | None = None,
    cwd: Path | None = None,
    browser: bool = False,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` gets the address once it listens.

    Raises InputError for an open address without keys, OutputError for an address or a store that
    is taken, FormatError for a store of a newer version.
    """
    from pluribus import catalogue

    place = store if store is not None else default_store()
    with prepared(host, port, keys, place, cwd or Path.cwd()) as (server, listening, url):
        catalogue.finder()  # the first page is not the one that waits for it
        ready(url)
        if browser:
            webbrowser.open(url)
        server.run(sockets=[listening])


@contextmanager
def background(
    store: Path, cwd: Path, keys: tuple[str, ...] = (), host: str = "127.0.0.1"
) -> Iterator[str]:
    """Serve from a thread on a free port for as long as a block runs; gives the address."""
    with prepared(host, 0, keys, store, cwd) as (server, listening, url):
        thread = threading.Thread(
            target=lambda: server.run(sockets=[listening]), name="pluribus ui", daemon=True
        )
        thread.start()
        try:
            yield url
        finally:
            server.config.app.site.closing = True
            server.should_exit = True
            thread.join(5 * CLOSE_SECONDS)

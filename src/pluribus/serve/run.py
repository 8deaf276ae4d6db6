"""Starting and stopping: on a port until a signal, or in a thread for as long as a block runs."""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pluribus.core.errors import InputError, OutputError
from pluribus.core.optional import optional
from pluribus.serve.config import Limits, Server

CUT_SECONDS = 5.0  # for requests that were cut off to say so


def needed() -> None:
    """Raise ExtraError if a package of the extra `serve` is missing."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        optional(package, "serve", "the server")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_open(server: Server, host: str) -> tuple[str, ...]:
    """Return the keys. Raises InputError for other machines without keys, MissingError for none."""
    keys = server.secrets()
    if not keys and not is_loopback(host):
        raise InputError(
            f"{host} can be reached from other machines, and there are no keys; add 'keys: "
            "[VARIABLE]' to the server's file (or --key-env VARIABLE), or bind 127.0.0.1"
        )
    return keys


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OutputError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or small answers wait 40 ms
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host.strip("[]"), port))
    except OSError as error:
        made.close()
        raise OutputError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); another server may "
            "have it: choose another --port"
        ) from None
    made.listen(2048)
    return made


def address(listening: socket.socket) -> str:
    """Return the address that clients take, with /v1."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _graceful(app: Any, limits: Limits) -> Any:
    """Return uvicorn's server, which on a signal lets running requests finish first."""
    uvicorn = optional("uvicorn", "serve", "the server")
    from pluribus.serve.doors import Doors
    from pluribus.serve.remote import Remote

    class Graceful(uvicorn.Server):
        until: float | None = None  # when running requests are cut off
        cut = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            """Take no more requests; a second signal cuts off at once."""
            api = app.state.api
            self.until = time.monotonic() + (0 if api.gate.closing else limits.grace_seconds)
            api.gate.closing = True

        async def on_tick(self, counter: int) -> bool:
            """See whether all are done, or the time is over."""
            api = app.state.api
            if self.until is not None and not self.should_exit:
                now = time.monotonic()
                if now >= self.until and not self.cut:
                    self.cut, self.until = True, now + CUT_SECONDS
                    for cancel in list(api.running):
                        cancel()
                if not api.gate.inside or (self.cut and now >= self.until):
                    self.should_exit = True
            return await super().on_tick(counter)

        async def shutdown(self, sockets: Any = None) -> None:
            """End, connections to endpoints included."""
            await super().shutdown(sockets)
            for one in app.state.api.members.values():
                if isinstance(one, Remote):
                    await one.leave()

    config = uvicorn.Config(
        app,
        http=Doors(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(CUT_SECONDS)),
    )
    return Graceful(config)


def serve(
    server: Server,
    host: str = "127.0.0.1",
    port: int = 8000,
    told: Callable[[str], None] = lambda line: None,
    ready: Callable[[str, list[str]], None] = lambda url, models: None,
) -> None:
    """Serve until SIGINT or SIGTERM. `told` gets lines of what happens, `ready` the address.

    On a signal new requests are refused with 503, running ones have `grace_seconds`, and then are
    cut off; a second signal cuts at once. Raises what opening models raises, InputError for an open
    address without keys, OutputError for one that is taken.
    """
    needed()
    from pluribus.serve.app import build
    from pluribus.serve.served import open_all

    keys = check_open(server, host)
    listening = bound(host, port)
    try:
        members = open_all(server, lambda name: told(f"opening {name}"))
        try:
            app = build(members, server.limits, keys)
            for name, one in members.items():
                engine = getattr(one, "engine", None)
                if engine is not None and not engine.batches and getattr(one, "writes", True):
                    told(f"{name} writes one answer at a time")
            ready(address(listening), list(members))
            told(f"serving {', '.join(members)} at {address(listening)}")
            _graceful(app, server.limits).run(sockets=[listening])
            told("stopped")
        finally:
            for one in members.values():
                one.close()
    finally:
        listening.close()


@contextmanager
def background(
    members: Mapping[str, Any], limits: Limits | None = None, keys: tuple[str, ...] = ()
) -> Iterator[str]:
    """Serve opened models from a thread, on a free port of this machine; gives the address.

    The models are closed at the end.
    """
    needed()
    from pluribus.serve.app import build

    limits = limits or Limits()
    app = build(members, limits, keys)
    listening = bound("127.0.0.1", 0)
    running = _graceful(app, limits)
    thread = threading.Thread(
        target=lambda: running.run(sockets=[listening]), name="pluribus serve", daemon=True
    )
    thread.start()
    try:
        yield address(listening)
    finally:
        for cancel in list(app.state.api.running):
            cancel()
        running.should_exit = True
        thread.join(2 * CUT_SECONDS)
        for one in members.values():
            one.close()
        listening.close()

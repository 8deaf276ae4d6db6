"""Who may ask, and from which page: hosts, keys, tokens, and headers that bind the browser.

- Another site's page cannot reach this server under a name of its own: `Host` must be ours.
- It cannot post to us: `Origin` must be ours, and a form must carry the token of its session.
- Nothing that slips into a page can run or ask elsewhere: the content security policy says so.
"""

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from pluribus.serve.errors import ApiError
from pluribus.serve.gate import Gate
from pluribus.serve.run import is_loopback

COOKIE = "pluribus_ui"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# A report is somebody's document: it may draw and sort, and sees nothing of this server.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
OPEN = ("/enter", "/static/")  # without a key
MOST_SESSIONS = 1000

Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Guard:
    """Sessions, tokens and hosts of one server."""

    def __init__(self, host: str, port: int, keys: tuple[str, ...] = ()) -> None:
        self.gate = Gate(keys, 1)
        self.host, self.port = host.strip("[]").lower(), port
        self.local = is_loopback(host)
        self._secret = secrets.token_bytes(32)
        self._sessions: dict[str, None] = {}

    def expects(self, header: str) -> bool:
        """Whether a `Host` header names this server.

        On loopback these are its own names; elsewhere, where keys are needed, addresses too.
        """
        name, port = _split(header)
        if port not in ("", str(self.port)):
            return False
        if name == self.host or is_loopback(name):
            return True
        if self.local:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def admit(self, key: str) -> str:
        """Return a new session for a key. Raises ApiError for an unknown one."""
        self.gate.check(f"Bearer {key}")
        made = secrets.token_urlsafe(32)
        self._sessions[made] = None
        while len(self._sessions) > MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        return made

    def session(self, headers: Headers) -> str | None:
        """Return the session of a request, "" where none is needed, or None."""
        if not self.gate.locked:
            return ""
        if headers.get("authorization"):
            try:
                self.gate.check(headers["authorization"])
            except ApiError:
                return None
            return headers["authorization"]
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return None
        return found.value if found is not None and found.value in self._sessions else None

    def token(self, session: str) -> str:
        """Return what the forms of a session carry."""
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def fits(self, session: str, token: str) -> bool:
        """Whether a form came from a page of this session."""
        return hmac.compare_digest(self.token(session).encode(), token.encode("utf-8", "replace"))


class Guarded:
    """The application behind a guard."""

    def __init__(self, app: App, guard: Guard) -> None:
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served here")

        async def bound(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                message["headers"] = headers.raw
            await send(message)

        refused = self._refused(scope, Headers(scope=scope))
        await (refused or self.app)(scope, receive, bound)

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        guard, path = self.guard, scope["path"]
        host = headers.get("host", "")
        if not guard.expects(host):
            return PlainTextResponse("this server does not go by that name\n", 421)
        if scope["method"] not in ("GET", "HEAD"):
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
            if (origin and origin != f"http://{host}") or site not in ("same-origin", "none"):
                return PlainTextResponse("forms are taken from this server's pages only\n", 403)
        session = guard.session(headers)
        scope.setdefault("state", {})["session"] = session or ""
        if session is None and not path.startswith(OPEN):
            if headers.get("authorization") or "text/html" not in headers.get("accept", ""):
                return PlainTextResponse(
                    "a key is needed; send it as 'Authorization: Bearer KEY'\n", 401
                )
            return RedirectResponse(f"/enter?next={quote(path)}", 303)
        return None


def _split(header: str) -> tuple[str, str]:
    """Return name and port of a `Host` header, an IPv6 address without its brackets."""
    if header.startswith("["):
        name, _, rest = header[1:].partition("]")
        return name.lower(), rest.removeprefix(":")
    name, _, port = header.partition(":")
    return name.lower().rstrip("."), port

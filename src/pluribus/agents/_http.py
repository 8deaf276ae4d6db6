"""JSON over HTTP with the standard library: retries, time limits, errors that say what to do."""

import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from pluribus.core.errors import FormatError, InputError, NetworkError

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST = 60.0  # seconds between two tries
NOT_TAKEN = (400, 422)  # how endpoints say that they don't know a field


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key is for the endpoint that was named."""

    def redirect_request(self, *_: Any) -> None:
        """Let the status be the answer."""


class Client:
    """Posts to one endpoint."""

    def __init__(self, base: str, key: str, timeout: float, tries: int, backoff: float) -> None:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"'{base}' is no address of an endpoint; give one such as http://localhost:8000/v1"
            )
        self.base, self._key = base.rstrip("/"), key
        self._timeout, self._tries, self._backoff = timeout, tries, backoff
        self._opener = urllib.request.build_opener(_Stay)
        if not key.isascii() or not key.isprintable():
            raise InputError("the endpoint's key holds characters that no header can; look at it")

    def post(self, path: str, body: Any, *, refusable: bool = False) -> Any:
        """Return the JSON that comes back; None if a `refusable` request is not understood.

        Raises NetworkError, with the endpoint's own words, or FormatError.
        """
        said = ""
        for attempt in range(self._tries):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    said = f"status {error.code}: {_words(error)}"
                if refusable and error.code in NOT_TAKEN:
                    return None
                if error.code not in PASSING:
                    raise NetworkError(f"{self.base}{path}: {said}{_hint(error.code)}") from None
                wait = _retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                said, wait = str(getattr(error, "reason", error)) or type(error).__name__, None
            if attempt + 1 < self._tries:
                pause = self._backoff * 2**attempt if wait is None else wait
                time.sleep(min(pause, LONGEST))
        raise NetworkError(
            f"{self.base}{path}: no answer after {self._tries} tries ({said}); is it running, and "
            "is the address right?"
        )

    def _once(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.base + path, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self._timeout) as answer:
            raw = answer.read()
        try:
            return json.loads(raw)
        except ValueError:
            raise FormatError(
                f"{self.base}{path}: the answer is not JSON: {raw[:80]!r}; is the address right? "
                "It usually ends in /v1"
            ) from None


def _words(error: urllib.error.HTTPError) -> str:
    """Return what an endpoint says about its refusal."""
    try:
        raw = error.read(2000)
        told = json.loads(raw)
    except (OSError, ValueError, http.client.HTTPException):
        return str(error.reason)
    inner = told.get("error", told) if isinstance(told, dict) else told
    said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(said).split())[:300]


def _hint(code: int) -> str:
    if code in (401, 403):
        return " (is the right key in the environment variable?)"
    if 300 <= code < 400:
        return " (it points elsewhere; give that address if you trust it)"
    return " (is the address right? It usually ends in /v1)" if code == 404 else ""


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a header asks for: a number, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None  # neither: the usual pause

"""Models of others: requests are passed on to an OpenAI-compatible endpoint, answers back."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pluribus.core.optional import optional
from pluribus.serve.config import Endpoint
from pluribus.serve.errors import ApiError

LONGEST = 2000  # characters of an error that is passed on


class Remote:
    """One endpoint's model under a name of ours."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.name, self.endpoint = name, endpoint
        self.created = int(time.time())
        httpx = optional("httpx", "serve", "asking an endpoint")
        key = endpoint.key()
        self._failures = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError)
        self._slow = httpx.TimeoutException
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(endpoint.timeout_seconds, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    def close(self) -> None:
        """Nothing runs here; `leave` closes connections."""

    async def leave(self) -> None:
        """Close connections, on the loop that used them."""
        await self._client.aclose()

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Pass a request on and return the answer. Raises ApiError as the endpoint says."""
        try:
            got = await self._client.post(self._url(path), json=self._mine(body))
        except self._failures as error:
            raise self._failed(error) from None
        if got.status_code != 200:
            raise self._refused(got.status_code, got.content, got.headers)
        return self._read(got.content)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Pass a request on and yield the chunks as they come; the end is the iterator's.

        Raises ApiError as the endpoint says, also in the middle of an answer.
        """
        begun = False
        try:
            async with self._client.stream("POST", self._url(path), json=self._mine(body)) as got:
                if got.status_code != 200:
                    raise self._refused(got.status_code, await got.aread(), got.headers)
                begun = True
                async for line in got.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield self._read(data.encode())
        except self._failures as error:
            if begun and not isinstance(error, self._slow):
                raise self._broken() from None
            raise self._failed(error) from None
        raise self._broken()

    def _broken(self) -> ApiError:
        return ApiError(502, f"the endpoint of {self.name!r} broke off in the middle of an answer")

    def _url(self, path: str) -> str:
        return f"{self.endpoint.url}/{path}"

    def _mine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**body, "model": self.endpoint.model}

    def _read(self, content: bytes) -> dict[str, Any]:
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ApiError(502, f"the endpoint of {self.name!r} answered with no JSON object")
        if value.get("error") is not None and "choices" not in value:
            raise ApiError(502, f"the endpoint of {self.name!r} failed: {_words(value)[0]}")
        if "model" in value:
            value["model"] = self.name
        return value

    def _failed(self, error: Exception) -> ApiError:
        if isinstance(error, self._slow):
            return ApiError(504, f"the endpoint of {self.name!r} did not answer in time")
        return ApiError(
            503,
            f"the endpoint of {self.name!r} cannot be reached ({type(error).__name__})",
            retry_after=5,
        )

    def _refused(self, status: int, content: bytes, headers: Any) -> ApiError:
        """Return what the client is told: its own faults as they are, ours as a bad gateway."""
        try:
            said, param, code = _words(json.loads(content))
        except ValueError:
            said = param = code = None
        if status in (401, 403):  # the key is the server's, not the client's
            return ApiError(502, f"the endpoint of {self.name!r} does not take the server's key")
        after = headers.get("Retry-After", "")
        wait = None
        if status in (429, 503):
            wait = int(after) if after.isdecimal() else 5
        passed = status if 400 <= status < 500 or status == 503 else 502
        text = f"the endpoint of {self.name!r} says: {said or f'status {status}'}"
        return ApiError(passed, text, param=param, code=code, retry_after=wait)


def _words(told: Any) -> tuple[str | None, str | None, str | None]:
    """Return message, parameter and code of an error, as far as they are told, as texts."""
    error = told.get("error", told.get("detail")) if isinstance(told, dict) else None
    if not isinstance(error, dict):
        return None if error is None else str(error)[:LONGEST], None, None
    found = (error.get(name) for name in ("message", "param", "code"))
    message, param, code = (None if one is None else str(one)[:LONGEST] for one in found)
    return message, param, code

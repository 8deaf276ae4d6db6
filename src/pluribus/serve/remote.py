"""Models of others: requests are passed on to an OpenAI-compatible endpoint, answers back."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pluribus.core.optional import optional
from pluribus.serve.config import Endpoint
from pluribus.serve.errors import ApiError


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
        """Nothing runs here; connections end with the program."""

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
        try:
            async with self._client.stream("POST", self._url(path), json=self._mine(body)) as got:
                if got.status_code != 200:
                    raise self._refused(got.status_code, await got.aread(), got.headers)
                async for line in got.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield self._read(data.encode())
        except self._failures as error:
            raise self._failed(error) from None
        raise ApiError(502, f"the endpoint of {self.name!r} broke off in the middle of an answer")

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
        if "error" in value and "choices" not in value:
            told = value["error"]
            said = told.get("message") if isinstance(told, dict) else told
            raise ApiError(502, f"the endpoint of {self.name!r} failed: {said}")
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
        said = f"status {status}"
        param = code = None
        try:
            told = json.loads(content).get("error", {})
            said, param, code = told["message"], told.get("param"), told.get("code")
        except (ValueError, AttributeError, KeyError, TypeError):
            pass  # no error of OpenAI's shape: the status is all that is known
        if status in (401, 403):  # the key is the server's, not the client's
            return ApiError(502, f"the endpoint of {self.name!r} does not take the server's key")
        after = headers.get("Retry-After", "")
        wait = None
        if status in (429, 503):
            wait = int(after) if after.isdigit() else 5
        passed = status if 400 <= status < 500 or status == 503 else 502
        text = f"the endpoint of {self.name!r} says: {said}"
        return ApiError(passed, text, param=param, code=code, retry_after=wait)

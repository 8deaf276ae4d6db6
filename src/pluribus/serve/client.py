"""A small client of OpenAI's protocol, for the terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pluribus.core.errors import FormatError, InputError, NetworkError
from pluribus.core.optional import optional

WAIT = 600.0  # seconds for a piece of an answer: models on a processor think long


class Client:
    """Asks a server. Addresses end with /v1, or get it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        self._httpx = optional("httpx", "serve", "chatting")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = self._httpx.Client(headers=headers, timeout=WAIT)

    def close(self) -> None:
        """Close connections."""
        self._client.close()

    def models(self) -> list[str]:
        """Return the models' names. Raises NetworkError, or InputError for what is refused."""
        try:
            got = self._client.get(f"{self.url}/models")
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            raise self._failed(error) from None
        if got.status_code != 200:
            raise self._refused(got.status_code, got.content)
        try:
            return [str(one["id"]) for one in got.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise FormatError(f"{self.url}: answers, but not as OpenAI's protocol says") from None

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], **settings: Any
    ) -> Iterator[str]:
        """Yield an answer's text as it comes; leaving the iterator stops the answer.

        Raises NetworkError, or InputError for what is refused or breaks off.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **settings}
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as got:
                if got.status_code != 200:
                    raise self._refused(got.status_code, got.read())
                for line in got.iter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        yield from self._text(data)
        except (self._httpx.HTTPError, self._httpx.StreamError) as error:
            raise self._failed(error) from None

    def _text(self, data: str) -> Iterator[str]:
        try:
            chunk = json.loads(data)
        except ValueError:
            raise FormatError(f"{self.url}: a piece of the answer is no JSON") from None
        if "error" in chunk:
            raise InputError(f"the answer broke off: {_message(chunk)}")
        for choice in chunk.get("choices", ()):
            if text := (choice.get("delta") or {}).get("content"):
                yield text

    def _failed(self, error: Exception) -> NetworkError:
        return NetworkError(f"{self.url} cannot be reached ({type(error).__name__}: {error})")

    def _refused(self, status: int, content: bytes) -> InputError:
        try:
            told = _message(json.loads(content))
        except ValueError:
            told = f"status {status}"
        hint = "; name the variable with the key: --key-env VARIABLE" if status == 401 else ""
        return InputError(f"{self.url}: {told}{hint}")


def _message(value: Any) -> str:
    told = value.get("error") if isinstance(value, dict) else None
    return str(told.get("message")) if isinstance(told, dict) else str(told)

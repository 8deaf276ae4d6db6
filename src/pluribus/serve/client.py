"""A small client of OpenAI's protocol, for the terminal."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InputError("the key holds characters that no header can; look at it")
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
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        thought: Callable[[str, str], None] | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yield an answer's text as it comes; leaving the iterator stops the answer.

        `thought` gets what leads to it: who wrote it (a worker, or nobody by name), and a piece.
        Raises NetworkError, or InputError for what is refused or breaks off.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **settings}
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as got:
                if got.status_code != 200:
                    raise self._refused(got.status_code, got.read())
                for line in got.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    if (data := line[5:].strip()) == "[DONE]":
                        return
                    yield from self._text(data, thought)
        except (self._httpx.HTTPError, self._httpx.StreamError) as error:
            raise self._failed(error) from None
        raise NetworkError(f"{self.url} broke off in the middle of the answer")

    def _text(self, data: str, thought: Callable[[str, str], None] | None) -> Iterator[str]:
        try:
            chunk = json.loads(data)
        except ValueError:
            raise FormatError(f"{self.url}: a piece of the answer is no JSON") from None
        if not isinstance(chunk, dict):
            raise FormatError(f"{self.url}: a piece of the answer is no JSON object")
        if "error" in chunk:
            raise InputError(f"the answer broke off: {_message(chunk)}")
        for choice in chunk.get("choices") or ():
            told = choice.get("delta") if isinstance(choice, dict) else None
            if not isinstance(told, dict):
                continue
            if isinstance(text := told.get("content"), str):
                yield text
            if thought is not None and isinstance(text := told.get("reasoning_content"), str):
                thought(str(told.get("worker") or ""), text)
                yield ""  # so that who shows it may

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

"""Prompts as messages and as plain text; requests as one digest."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pluribus.core.errors import InputError
from pluribus.decode.scaling.interface import Prompt

ROLES = ("system", "developer", "user", "assistant", "tool")


class Asked(NamedTuple):
    """All that a model was asked for at once."""

    prompt: Prompt
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    prefix: str

    @classmethod
    def of(cls, prompt: Prompt, n: int, **settings: Any) -> "Asked":
        """Return a checked request. Raises InputError for a number out of range."""
        stop = settings.pop("stop")
        asked = cls(
            prompt=prompt, n=n, stop=(stop,) if isinstance(stop, str) else tuple(stop), **settings
        )
        if asked.n < 1 or asked.max_tokens < 1:
            raise InputError(
                f"n is {asked.n} and max_tokens {asked.max_tokens}; give at least 1 of each"
            )
        if not 0 <= asked.temperature < float("inf") or not 0 < asked.top_p <= 1:
            raise InputError(
                f"temperature is {asked.temperature} and top_p {asked.top_p}; give 0 or more, and "
                "above 0 to 1"
            )
        if "" in asked.stop:
            raise InputError("a stop text is empty, so nothing could be written; leave it out")
        messages(prompt)
        return asked

    def settings(self) -> dict[str, Any]:
        """Return what `sample` takes beside prompt and n."""
        return {name: getattr(self, name) for name in self._fields[2:]}

    def digest(self, model: str) -> str:
        """Return a digest of the request to a model of this name."""
        told = {
            "model": model,
            "messages": messages(self.prompt),
            "text": isinstance(self.prompt, str),
            "n": self.n,
            **self.settings(),
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return a prompt as messages; a text is one turn of the user.

    Raises InputError for no message, or one without role and content.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    found = []
    for message in prompt:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise InputError(
                f"a message is {dict(message)!r}; expected a role of {', '.join(ROLES)} and a "
                "content that is a text"
            )
        found.append({"role": role, "content": content})
    if not found:
        raise InputError("there is no message; give at least one")
    return found


def plain(prompt: Prompt) -> str:
    """Return a prompt as one text: messages with blank lines between them."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in messages(prompt))


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Return what precedes the first stop text, and which one that is."""
    places = [(at, end) for end in stop if (at := text.find(end)) >= 0]
    if not places:
        return text, None
    at, end = min(places, key=lambda place: (place[0], -len(place[1])))
    return text[:at], end

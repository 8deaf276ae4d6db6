"""A model behind an endpoint that speaks OpenAI's protocol: vLLM, llama.cpp, pluribus serve.

Requests that fail for a passing reason (429, 5xx, a broken connection, no answer in time) are tried
again, after the time that `Retry-After` names or 1, 2, 4 ... times `backoff` seconds. An endpoint
that refuses `n`, or gives fewer completions than asked for, is asked once for each.

`continuation` says how the endpoint is told to go on with a message that the assistant has begun:
"continue_final_message" (vLLM, SGLang), "prefix" (a mark on the message, as DeepSeek and Mistral
have it), or "none": then a prefix is refused, and searches over steps with it. Through
`api="completions"` the prompt is plain text and a prefix follows it, so nothing is needed.

Many endpoints don't tell a stop text from the model's own end: where they give no `stop_reason`,
and stop texts were asked for, "stop" is taken at its word.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pluribus.agents._http import Client
from pluribus.agents._messages import Asked, cut, messages, plain
from pluribus.core.errors import FormatError, InputError
from pluribus.decode.scaling.interface import Completion, Finish, Prompt

Continuation = Literal["none", "continue_final_message", "prefix"]


class OpenAICompatible:
    """Draws from an endpoint."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str = "OPENAI_API_KEY",
        api: Literal["chat", "completions"] = "chat",
        continuation: Continuation = "none",
        log_probs: bool = False,
        timeout: float = 120.0,
        tries: int = 5,
        backoff: float = 1.0,
        concurrency: int = 8,
        extra: dict[str, Any] | None = None,
        client: Any = None,
    ) -> None:
        """Name the endpoint, such as http://localhost:8000/v1, and its model.

        `key` is the environment variable that holds the key; without it none is sent. `extra` are
        further fields of every request; `client` posts in place of an `_http.Client` of its own.
        Raises InputError for an address that is none, or a limit out of range.
        """
        if tries < 1 or concurrency < 1 or not timeout > 0 or not backoff >= 0:
            raise InputError(
                f"tries is {tries}, concurrency {concurrency}, timeout {timeout} and backoff "
                f"{backoff}; give at least 1, 1, more than 0, and 0"
            )
        self.model, self.api, self.continuation = model, api, continuation
        self.log_probs, self.extra, self.concurrency = log_probs, dict(extra or {}), concurrency
        self.continues = api == "completions" or continuation != "none"
        self._client = client or Client(
            base_url, os.environ.get(key, "").strip(), timeout, tries, backoff
        )
        self._takes_n = True

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
        seed: int = 0,
        prefix: str = "",
    ) -> list[Completion]:
        """Return n completions.

        Raises NetworkError if the endpoint can't be reached or refuses, FormatError for an answer
        that is not of the protocol, InputError for a prefix that it cannot go on from.
        """
        asked = Asked.of(
            prompt,
            n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            stop=stop,
            seed=seed,
            prefix=prefix,
        )
        if prefix and not self.continues:
            raise InputError(
                "this endpoint is not known to go on from a message that was begun; say how with "
                "continuation='continue_final_message' (vLLM, SGLang) or 'prefix', or use "
                "api='completions'"
            )
        found: list[Completion] = []
        if n == 1 or self._takes_n:
            found = self._asked(asked, n, 0)[:n]
        if len(found) < n:
            if n > 1:
                self._takes_n = False
            with ThreadPoolExecutor(min(self.concurrency, n - len(found))) as pool:
                rest = range(len(found), n)
                for made in pool.map(lambda i: self._asked(asked, 1, i), rest):
                    found += made[:1]
        return found

    def _asked(self, asked: Asked, n: int, place: int) -> list[Completion]:
        """Return what one request gives: none if it was refused for its n."""
        body = {
            "model": self.model,
            **self._prompt(asked),
            "n": n,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "max_tokens": asked.max_tokens,
            "seed": (asked.seed + place) % (1 << 31),
            **({"stop": list(asked.stop)} if asked.stop else {}),
            **self._wants_log_probs(),
            **self.extra,
        }
        if n == 1:
            del body["n"]  # some endpoints know no such field
        where = "/chat/completions" if self.api == "chat" else "/completions"
        told = self._client.post(where, body, refusable=n > 1)
        return [] if told is None else self._completions(told, asked)

    def _prompt(self, asked: Asked) -> dict[str, Any]:
        if self.api == "completions":
            return {"prompt": plain(asked.prompt) + asked.prefix}
        said: list[dict[str, Any]] = [*messages(asked.prompt)]
        if not asked.prefix:
            return {"messages": said}
        begun: dict[str, Any] = {"role": "assistant", "content": asked.prefix}
        if self.continuation == "prefix":
            return {"messages": [*said, {**begun, "prefix": True}]}
        return {
            "messages": [*said, begun],
            "add_generation_prompt": False,
            "continue_final_message": True,
        }

    def _wants_log_probs(self) -> dict[str, Any]:
        if not self.log_probs:
            return {}
        return {"logprobs": True} if self.api == "chat" else {"logprobs": 0}

    def _completions(self, told: Any, asked: Asked) -> list[Completion]:
        choices = told.get("choices") if isinstance(told, dict) else None
        if not isinstance(choices, list) or not choices:
            raise FormatError(
                f"{self._client.base}: the answer has no choices; is it an endpoint of OpenAI's "
                "protocol?"
            )
        usage = told.get("usage") or {}
        # The usage is of all choices together; each is given its share by the length of its text.
        texts = [self._text(choice) for choice in choices]
        counts = _shares(texts, usage.get("completion_tokens"))
        read = int(usage.get("prompt_tokens") or 0)
        found = []
        for choice, text, tokens in zip(choices, texts, counts, strict=True):
            finish, stopped = _finish(choice, asked.stop)
            text, seen = cut(text, asked.stop)  # one that keeps the stop text, or ignored it
            if seen is not None:
                finish, stopped = "stop", seen
            found.append(Completion(text, tokens, finish, _log_probs(choice), read, stopped))
        return found

    def _text(self, choice: Any) -> str:
        message = choice.get("message") if isinstance(choice, dict) else None
        text = choice.get("text") if self.api == "completions" else (message or {}).get("content")
        if text is None and isinstance(choice, dict) and (message or self.api == "completions"):
            return ""  # what protocols say for an empty answer
        if not isinstance(text, str):
            raise FormatError(f"{self._client.base}: a choice has no text: {str(choice)[:120]}")
        return text


def _finish(choice: dict[str, Any], stop: Sequence[str]) -> tuple[Finish, str | None]:
    reason = choice.get("finish_reason")
    if reason == "length":
        return "length", None
    if "stop_reason" in choice:  # vLLM: the stop text, or nothing for the model's own end
        which = choice["stop_reason"]
        return ("stop", which) if which in stop else ("end", None)
    return ("stop" if reason == "stop" and stop else "end"), None


def _log_probs(choice: dict[str, Any]) -> tuple[float, ...] | None:
    told = choice.get("logprobs")
    if not isinstance(told, dict):
        return None
    if isinstance(content := told.get("content"), list):
        return tuple(float(token["logprob"]) for token in content)
    if isinstance(given := told.get("token_logprobs"), list):
        return tuple(float(value) for value in given)
    return None


def _shares(texts: Sequence[str], total: Any) -> list[int]:
    """Return tokens of each text: the total in proportion, or words where there is no total."""
    if len(texts) == 1 and isinstance(total, int):
        return [total]
    if not isinstance(total, int):
        return [max(1, len(text.split())) for text in texts]
    letters = sum(map(len, texts)) or 1
    sums, told, before = 0, [], 0
    for text in texts:
        sums += len(text)
        upto = round(total * sums / letters)
        told.append(upto - before)
        before = upto
    return told

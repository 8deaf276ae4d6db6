"""Answers of OpenAI's protocol: whole ones and chunks, from the events of answers."""

import base64
import struct
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pluribus.serve.sampling import Likely
from pluribus.serve.text import token_bytes, token_text
from pluribus.serve.writing import Done, Event, Piece, Prompt, Thought

Kind = Literal["chat", "text"]


@dataclass
class Choice:
    """One answer as it comes in."""

    index: int
    ids: Sequence[int]  # of its prompt
    echo: str | None = None  # the prompt's text, where it is wanted back
    log_probs: int | None = None
    prompt: Sequence[Likely] = ()
    pieces: list[Piece] = field(default_factory=list)
    thoughts: dict[str, list[str]] = field(default_factory=dict)  # by who wrote them
    done: Done | None = None
    characters: int = 0  # of text that was told
    again: bool = False  # whether an earlier choice answers the same prompt

    def take(self, event: Event) -> None:
        """Keep what an event tells."""
        if isinstance(event, Prompt):
            self.prompt = event.likely
        elif isinstance(event, Piece):
            self.pieces.append(event)
        elif isinstance(event, Thought):
            self.thoughts.setdefault(event.by, []).append(event.text)
        elif isinstance(event, Done):
            self.done = event

    def forget(self) -> None:
        """Forget what was told and is not needed again."""
        self.pieces.clear()
        self.thoughts.clear()


class Answer:
    """Names, times and counts that all chunks of a request share."""

    def __init__(self, kind: Kind, model: str, tokenizer: Any, choices: Sequence[Choice]) -> None:
        self.kind, self.model, self.tokenizer = kind, model, tokenizer
        self.choices = list(choices)
        self.id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    # -- whole -------------------------------------------------------------------------------------

    def whole(self, prompts: int) -> dict[str, Any]:
        """Return the answer to a request of `prompts` prompt tokens, once all choices are done."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {
            **self._head(name),
            "choices": [self._choice(one) for one in self.choices],
            "usage": self.usage(prompts),
        }

    def usage(self, prompts: int) -> dict[str, Any]:
        """Return the counts of tokens; those that no answer shows are told apart."""
        done = [one.done for one in self.choices if one.done is not None]
        written, thought = sum(one.written for one in done), sum(one.thought for one in done)
        prompts += sum(
            one.done.read or 0 for one in self.choices if one.done is not None and not one.again
        )
        told: dict[str, Any] = {
            "prompt_tokens": prompts,
            "completion_tokens": written,
            "total_tokens": prompts + written,
        }
        if thought:
            told["completion_tokens_details"] = {"reasoning_tokens": thought}
        return told

    def _choice(self, one: Choice) -> dict[str, Any]:
        assert one.done is not None
        text = "".join(piece.text for piece in one.pieces)
        tokens = [token for piece in one.pieces for token in piece.tokens]
        made: dict[str, Any] = {"index": one.index, "finish_reason": one.done.reason}
        if self.kind == "chat":
            made["message"] = {"role": "assistant", "content": text, "refusal": None}
            if one.thoughts:
                workers = {by: "".join(texts) for by, texts in one.thoughts.items()}
                made["message"]["reasoning_content"] = "\n\n".join(workers.values())
                made["message"]["workers"] = workers
            made["logprobs"] = None if one.log_probs is None else self._chat_probs(tokens)
            return made
        made["text"] = text if one.echo is None else one.echo + text
        made["logprobs"] = None
        if one.log_probs is not None:
            made["logprobs"] = self._probs(one, [*tokens, *one.done.ended], first=True)
        return made

    # -- chunks ------------------------------------------------------------------------------------

    def opening(self, one: Choice) -> dict[str, Any] | None:
        """Return what a stream begins a choice with."""
        if self.kind == "chat":
            return self._chunk(one, {"role": "assistant", "content": ""}, None, None)
        if one.echo is None:
            return None
        probs = None if one.log_probs is None else self._probs(one, [], first=True)
        return self._chunk(one, one.echo, probs, None)

    def chunk(self, one: Choice, event: Event) -> dict[str, Any] | None:
        """Return what an event adds to a stream, or None if it adds nothing."""
        if isinstance(event, Piece):
            if self.kind == "chat":
                probs = None if one.log_probs is None else self._chat_probs(event.tokens)
                return self._chunk(one, {"content": event.text}, probs, None)
            probs = None if one.log_probs is None else self._probs(one, event.tokens)
            return self._chunk(one, event.text, probs, None)
        if isinstance(event, Thought) and self.kind == "chat":
            told = {"reasoning_content": event.text, "worker": event.by}
            return self._chunk(one, told, None, None)
        if isinstance(event, Done):
            probs = None
            if self.kind == "text" and one.log_probs is not None and event.ended:
                probs = self._probs(one, event.ended)
            return self._chunk(one, {} if self.kind == "chat" else "", probs, event.reason)
        return None

    def closing(self, prompts: int) -> dict[str, Any]:
        """Return the chunk with the usage."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": [], "usage": self.usage(prompts)}

    def _chunk(self, one: Choice, told: Any, probs: Any, reason: str | None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        what = "delta" if self.kind == "chat" else "text"
        choice = {"index": one.index, what: told, "logprobs": probs, "finish_reason": reason}
        return {**self._head(name), "choices": [choice]}

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    # -- log-probabilities -------------------------------------------------------------------------

    def _chat_probs(self, tokens: Sequence[Likely]) -> dict[str, Any]:
        return {"content": [self._told(one) for one in tokens], "refusal": None}

    def _told(self, one: Likely) -> dict[str, Any]:
        return {
            **self._entry(one.token, one.log_prob),
            "top_logprobs": [self._entry(token, log_prob) for token, log_prob in one.top],
        }

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        return {
            "token": token_text(self.tokenizer, token),
            "logprob": _finite(log_prob),
            "bytes": list(token_bytes(self.tokenizer, token)),
        }

    def _probs(self, one: Choice, tokens: Sequence[Likely], first: bool = False) -> dict[str, Any]:
        """Return the lists of the older protocol; with `first`, the prompt's where it is echoed.

        `top_logprobs` always holds the token itself too, as OpenAI's does.
        """
        likely: list[Likely | None] = list(tokens)
        names = [token_text(self.tokenizer, token.token) for token in tokens]
        if first and one.echo is not None:
            echoed = [None, *one.prompt][: len(one.ids)]
            likely = [*echoed, *likely]
            names = [*(token_text(self.tokenizer, i) for i in one.ids), *names]
        offsets = []
        for name in names:
            offsets.append(one.characters)
            one.characters += 0 if name.startswith("bytes:") else len(name)
        tops = [None if x is None else self._top(x) for x in likely]
        return {
            "tokens": names,
            "token_logprobs": [None if x is None else _finite(x.log_prob) for x in likely],
            "top_logprobs": tops if one.log_probs else None,
            "text_offset": offsets,
        }

    def _top(self, one: Likely) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, log_prob in (*one.top, (one.token, one.log_prob)):
            name = token_text(self.tokenizer, token)  # several tokens may have one text
            found[name] = max(_finite(log_prob), found.get(name, -1e4))
        return found


def _finite(log_prob: float) -> float:
    """Return a log-probability that JSON has a word for."""
    return max(log_prob, -9999.0)


def embeddings(
    model: str, vectors: Sequence[Sequence[float]], tokens: int, encoding: str | None
) -> dict[str, Any]:
    """Return the answer to a request for embeddings."""

    def written(vector: Sequence[float]) -> Any:
        if encoding != "base64":
            return list(vector)
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": i, "embedding": written(vector)}
            for i, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }

"""A model that says what it was told to: for tests, demonstrations, and dry runs of agents."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat

from pluribus.agents._messages import Asked, cut, plain
from pluribus.core.errors import InputError
from pluribus.decode.scaling.interface import Completion, Prompt

Reply = str | Completion
Script = (
    Sequence[Reply]
    | Callable[[Asked], Reply | Sequence[Reply]]
    | Mapping[str, Reply | Sequence[Reply]]
)


class Scripted:
    """Says its lines and records what it was asked, in `asked`.

    The script is a list, said one after another; a function of the request (n replies, or one that
    is repeated n times); or rules: patterns that are searched for in prompt and prefix, the first
    that is found says its replies in turn, the last one again and again.

    A token is a word with the space before it. Stop texts and max_tokens are kept to.
    """

    def __init__(self, script: Script, *, continues: bool = True) -> None:
        """Raise InputError for rules that are no patterns, or without replies."""
        self.continues = continues
        self.asked: list[Asked] = []
        self._lock = threading.Lock()
        self._list: Iterator[Reply] | None = None
        self._rules: list[tuple[re.Pattern[str], Iterator[Reply]]] = []
        self._call: Callable[[Asked], Reply | Sequence[Reply]] | None = None
        if isinstance(script, Mapping):
            self._rules = [(_pattern(rule), _endless(rule, said)) for rule, said in script.items()]
        elif callable(script):
            self._call = script
        else:
            self._list = iter(script)

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
        """Return the next replies. Raises InputError when the script has none for this."""
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
        with self._lock:
            self.asked.append(asked)
            replies = self._replies(asked)
        if len(replies) != n:
            raise InputError(f"the script gave {len(replies)} replies when {n} were asked for")
        return [_shortened(reply, asked) for reply in replies]

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(_words(text))

    def _replies(self, asked: Asked) -> list[Reply]:
        if self._call is not None:
            said = self._call(asked)
            return [said] * asked.n if isinstance(said, str | Completion) else list(said)
        if self._list is not None:
            found = list(islice(self._list, asked.n))
            if len(found) < asked.n:
                raise InputError(
                    f"the script has no line left for request {len(self.asked)}: "
                    f"{plain(asked.prompt)[-60:]!r}"
                )
            return found
        text = plain(asked.prompt) + asked.prefix
        for pattern, said in self._rules:
            if pattern.search(text):
                return [next(said) for _ in range(asked.n)]
        raise InputError(f"no rule of the script fits {text[-60:]!r}")


def _pattern(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule)
    except re.error as error:
        raise InputError(f"the rule {rule!r} is no regular expression: {error}") from None


def _endless(rule: str, said: Reply | Sequence[Reply]) -> Iterator[Reply]:
    replies = [said] if isinstance(said, str | Completion) else list(said)
    if not replies:
        raise InputError(f"the rule {rule!r} has no reply; give at least one")
    return chain(replies[:-1], repeat(replies[-1]))


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def _shortened(reply: Reply, asked: Asked) -> Completion:
    if isinstance(reply, Completion):
        return reply
    text, ended = cut(reply, asked.stop)
    words = _words(text)
    asked_tokens = len(_words(plain(asked.prompt) + asked.prefix))
    if len(words) > asked.max_tokens:
        kept = "".join(words[: asked.max_tokens])
        return Completion(kept, asked.max_tokens, "length", prompt_tokens=asked_tokens)
    made = Completion(text, len(words), "end", prompt_tokens=asked_tokens)
    return made if ended is None else replace(made, finish="stop", stopped_at=ended)

"""A cassette: what a model said is recorded once, and replayed without it.

One JSON object a line: the digest of a request, the request, and the completions. Lines are written
whole, and a last line that was cut off is left out.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pluribus.agents._messages import Asked, messages, plain
from pluribus.core.errors import FormatError, MissingError
from pluribus.decode.scaling.interface import Completion, Generator, Prompt
from pluribus.decode.scaling.journal import Journal, read


class Replay:
    """Replays a cassette; with a model, requests that are not on it are asked and recorded.

    A request that was recorded several times is replayed in that order, then from the beginning.
    """

    def __init__(self, path: str | Path, model: Generator | None = None, *, name: str = "") -> None:
        """Raise MissingError without a cassette and a model, FormatError for another file."""
        self.path, self._model, self._name = Path(path).expanduser(), model, name
        self.continues = True if model is None else getattr(model, "continues", True)
        self._said: dict[str, list[list[Completion]]] = defaultdict(list)
        self._next: dict[str, int] = defaultdict(int)
        if model is None and not self.path.is_file():
            raise MissingError(f"{self.path}: no such cassette; give a model to record one")
        self._journal = None if model is None else Journal(self.path)
        lines = read(self.path) if self._journal is None else self._journal.lines
        for number, line in enumerate(lines, 1):
            try:
                made = [Completion.of(one) for one in line["completions"]]
                self._said[line["request"]].append(made)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise FormatError(
                    f"{self.path}, line {number}: no line of a cassette ({error})"
                ) from None

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
        """Return what was recorded. Raises MissingError for a request that is not on the tape."""
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
        key = asked.digest(self._name)
        tape = self._said[key]
        if tape and (self._model is None or self._next[key] < len(tape)):
            made = tape[self._next[key] % len(tape)]
            self._next[key] += 1
            return made
        if self._model is None or self._journal is None:
            raise MissingError(
                f"{self.path}: the request {plain(prompt)[-60:]!r} (n={n}, seed={seed}) was never "
                "recorded; record it with a model"
            )
        made = self._model.sample(prompt, n, **asked.settings())
        tape.append(made)
        self._next[key] += 1
        self._journal.append(
            {
                "request": key,
                "messages": messages(prompt),
                "n": n,
                **asked.settings(),
                "completions": [one.to_dict() for one in made],
            }
        )
        return made

    def close(self) -> None:
        """Let go of the file."""
        if self._journal is not None:
            self._journal.close()

"""A model whose completions are kept on disk, by the content of the request.

One file a request, named by its digest, written under another name and renamed: writers of several
processes cannot harm each other, and a file that is not whole counts as absent. Seeds belong to the
request, so different draws stay different.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pluribus.agents._messages import Asked, messages
from pluribus.core.errors import InputError, OutputError
from pluribus.core.whole import whole_file
from pluribus.decode.scaling.interface import Completion, Generator, Prompt


class Cached:
    """Asks a model only for what it was not asked before."""

    def __init__(self, model: Generator, folder: str | Path, *, name: str) -> None:
        """Keep completions in a folder; `name` tells models apart that share it.

        Raises InputError without a name, OutputError for a folder that cannot be made.
        """
        if not name:
            raise InputError("a cache needs the model's name, for other models' texts differ")
        self._model, self._name, self._folder = model, name, Path(folder).expanduser()
        self.continues = getattr(model, "continues", True)
        self.hits = self.misses = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self._folder}: no folder for a cache ({error.strerror})") from None

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
        """Return n completions, from disk if they are there."""
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
        path = self._folder / f"{asked.digest(self._name)}.json"
        if (found := _kept(path, n)) is not None:
            self.hits += 1
            return found
        self.misses += 1
        made = self._model.sample(prompt, n, **asked.settings())
        if len(made) == n:  # fewer were cut by a budget, and say nothing of the model
            told = {
                "model": self._name,
                "messages": messages(prompt),
                "completions": [one.to_dict() for one in made],
            }
            with whole_file(path) as part:
                part.write_text(json.dumps(told), "utf-8")
        return made

    def count(self, text: str) -> int:
        """Return how many tokens a text has, as the model counts them; 0 if it cannot."""
        own = getattr(self._model, "count", None)
        return 0 if own is None else own(text)


def _kept(path: Path, n: int) -> list[Completion] | None:
    try:
        told = json.loads(path.read_text("utf-8"))
        found = [Completion.of(one) for one in told["completions"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or broken: it is written anew
    return found if len(found) == n else None

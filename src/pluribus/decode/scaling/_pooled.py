"""Completions that were drawn before, handed out in their order as if they were drawn now."""

from collections.abc import Sequence

from pluribus.decode.scaling.budget import BudgetSpent
from pluribus.decode.scaling.interface import Completion, Generator, Prompt


class Handed:
    """Hands out completions, then asks the generator behind it, if there is one.

    Raises BudgetSpent when there is nothing left to hand out.
    """

    def __init__(self, completions: Sequence[Completion], then: Generator | None = None) -> None:
        self._left, self._then = list(completions), then
        self.given: list[Completion] = []  # of those handed out
        self.continues = then is not None and getattr(then, "continues", True)

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
        """Return the next n; those handed out were drawn with the settings of then."""
        found, self._left = self._left[:n], self._left[n:]
        self.given += found
        if len(found) < n and self._then is not None:
            found = found + self._then.sample(
                prompt,
                n - len(found),
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                stop=stop,
                seed=seed + len(found),
                prefix=prefix,
            )
        if not found:
            raise BudgetSpent("no completion is left in the pool")
        return found

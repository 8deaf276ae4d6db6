"""A model with a budget: agents call it until nothing is left."""

import time
from collections.abc import Sequence

from pluribus.decode.scaling.budget import Budget, BudgetSpent, Meter
from pluribus.decode.scaling.interface import Clock, Completion, Cost, Generator, Prompt


class Metered:
    """Counts what a model writes, and stops it at a budget."""

    def __init__(
        self, model: Generator, budget: Budget | None = None, *, clock: Clock = time.monotonic
    ) -> None:
        self._model = model
        self._meter = Meter(model, budget, clock=clock)
        self.continues = getattr(model, "continues", True)

    @property
    def cost(self) -> Cost:
        """What was used so far."""
        return self._meter.cost

    def count(self, text: str) -> int:
        """Return how many tokens a text has, as the model counts them; 0 if it cannot."""
        own = getattr(self._model, "count", None)
        return 0 if own is None else own(text)

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
        """Return up to n completions, fewer if the budget ends between them.

        Raises BudgetSpent when nothing is left.
        """
        made = self._meter.sample(
            prompt,
            n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            stop=stop,
            prefix=prefix,
            seed=seed,
        )
        if not made:
            raise BudgetSpent(
                f"the budget is spent: {self._meter.budget} allows no further completion after "
                f"{self.cost.calls} calls and {self.cost.tokens} tokens"
            )
        return made

"""Budgets: what may be used, what was, and a meter between a strategy and its generator.

Tokens are a hard limit: the last completion is cut short rather than over it. Calls are too, and
time is looked at before every call. So a run goes over by one call at most. Tokens that a verifier
writes count as well; prompts don't.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pluribus.core.errors import InputError, PluribusError
from pluribus.decode.scaling.interface import Clock, Completion, Cost, Generator, Prompt


class BudgetSpent(PluribusError, RuntimeError):
    """Nothing is left of a budget."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits; None is no limit. A call is one completion."""

    tokens: int | None = None  # written by generator and verifier
    calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Raise InputError for a limit that allows nothing."""
        for name in ("tokens", "calls", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(
                    f"a budget of {value} {name} allows nothing; give more than 0, or leave it out"
                )


class Meter:
    """Counts what a generator writes, and lets no more through than a budget allows."""

    def __init__(
        self,
        generator: Generator,
        budget: Budget | None = None,
        *,
        seed: int = 0,
        clock: Clock = time.monotonic,
    ) -> None:
        self.generator, self.budget, self.seed = generator, budget or Budget(), seed
        self._clock, self._began = clock, clock()
        self.tokens = self.calls = self.verifier_tokens = self.verifier_calls = self.appended = 0
        self._closed = False

    @property
    def cost(self) -> Cost:
        """What was used so far."""
        return Cost(
            self.tokens,
            self.calls,
            self._clock() - self._began,
            self.verifier_tokens,
            self.verifier_calls,
            self.appended,
        )

    @property
    def tokens_left(self) -> float:
        """Tokens that may still be written; infinity without a limit."""
        if self.budget.tokens is None:
            return math.inf
        return self.budget.tokens - self.tokens - self.verifier_tokens

    @property
    def spent(self) -> bool:
        """Whether nothing more may be asked for."""
        late = self.budget.seconds is not None and (
            self._clock() - self._began >= self.budget.seconds
        )
        called = self.budget.calls is not None and self.calls >= self.budget.calls
        return self._closed or late or called or self.tokens_left <= 0

    def sample(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_tokens: int = 2048,
        stop: Sequence[str] = (),
        prefix: str = "",
        seed: int | None = None,
    ) -> list[Completion]:
        """Return up to n completions: fewer, or none, once the budget is spent.

        Without a seed every request has one of its own, so copies of one beam differ.
        """
        if n < 1:
            raise InputError(f"{n} completions were asked for; give at least 1")
        found: list[Completion] = []
        while len(found) < n and not self.spent:
            count, most = self._allowed(n - len(found), max_tokens)
            try:
                made = self.generator.sample(
                    prompt,
                    count,
                    temperature=temperature,
                    top_p=top_p,
                    max_tokens=most,
                    stop=stop,
                    seed=self.seed + self.calls if seed is None else seed + len(found),
                    prefix=prefix,
                )
            except BudgetSpent:  # a generator with a budget of its own
                self._closed = True
                break
            if not made:
                raise InputError(
                    f"{type(self.generator).__name__} gave no completion when asked for {count}"
                )
            self.tokens += sum(one.tokens for one in made)
            self.calls += len(made)
            found += made
        return found

    def used(self, tokens: int, calls: int = 1) -> None:
        """Count what a verifier has used."""
        self.verifier_tokens += tokens
        self.verifier_calls += calls

    def append(self, text: str) -> None:
        """Count a text that a strategy put in, where the generator can count."""
        count = getattr(self.generator, "count", None)
        self.appended += count(text) if count is not None else 0

    def _allowed(self, n: int, max_tokens: int) -> tuple[int, int]:
        """Return how many completions may be asked for at once, and how long each may be."""
        if self.budget.calls is not None:
            n = min(n, self.budget.calls - self.calls)
        left = self.tokens_left
        if left == math.inf:
            return n, max_tokens
        most = min(max_tokens, int(left))
        return min(n, max(1, int(left) // most)), most

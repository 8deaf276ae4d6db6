"""One run of a strategy: samples within the budget, candidates, scores, and what happened."""

import math
from collections.abc import Sequence
from typing import Any

from pluribus.core.errors import InputError
from pluribus.decode.scaling.answers import aggregate
from pluribus.decode.scaling.budget import Budget, Meter
from pluribus.decode.scaling.interface import (
    Candidate,
    Completion,
    Event,
    Generator,
    Problem,
    Prompt,
    Sampling,
    Scaled,
    Verifier,
)
from pluribus.decode.scaling.strategies import STRATEGIES, facts


class Run:
    """What a strategy needs while it works on one problem."""

    def __init__(
        self,
        strategy: Any,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None,
        budget: Budget | None,
        *,
        draws: int = 1,
    ) -> None:
        """Raise InputError for what the strategy cannot work with.

        `draws` is how many completions of one prompt the strategy compares.
        """
        known = facts(strategy)
        self.sampling: Sampling = strategy.sampling
        self.how: str = getattr(strategy, "aggregate", "last")
        if known.verifier == "required" and verifier is None:
            free = [name for name in STRATEGIES if facts(STRATEGIES[name]).verifier != "required"]
            raise InputError(
                f"{known.name} needs a verifier; give one, or take a strategy that works without: "
                f"{', '.join(free)}"
            )
        if known.continues and not getattr(generator, "continues", True):
            raise InputError(
                f"{known.name} goes on from what was written, which this generator "
                f"({type(generator).__name__}) cannot: name the endpoint's way to continue a "
                "message, or take a strategy of whole samples, such as best_of_n"
            )
        if draws > 1 and self.sampling.temperature == 0:
            raise InputError(
                f"{known.name} compares {draws} completions, but at temperature 0 all are the "
                "same; give a temperature above 0"
            )
        self.problem = Problem.of(problem)
        self.verifier = verifier
        self.meter = Meter(generator, budget, seed=self.sampling.seed)
        self.events: list[Event] = []
        self._scores: dict[tuple[str, ...], tuple[float, ...]] = {}

    @property
    def spent(self) -> bool:
        """Whether the budget is."""
        return self.meter.spent

    def tell(self, kind: str, **values: Any) -> None:
        """Add a line to the trace."""
        self.events.append(Event(kind, values))

    def sample(
        self,
        n: int = 1,
        *,
        prompt: Prompt | None = None,
        prefix: str = "",
        temperature: float | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> list[Completion]:
        """Return up to n completions of the problem, or another prompt, within the budget."""
        settings = self.sampling
        made = self.meter.sample(
            self.problem.question if prompt is None else prompt,
            n,
            temperature=settings.temperature if temperature is None else temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens if max_tokens is None else max_tokens,
            stop=settings.stop if stop is None else stop,
            prefix=prefix,
        )
        if len(made) < n:
            self.tell("budget", wanted=n, made=len(made))
        return made

    def answer(self, text: str) -> str | None:
        """Return the answer in a text; an extractor that raises is told of in the trace."""
        try:
            return self.problem.extract(text)
        except Exception as error:  # whatever a user's function raises: no answer, and told
            self.tell("extractor", error=f"{type(error).__name__}: {error}", text=text)
            return None

    def candidate(
        self,
        text: str,
        tokens: int,
        *,
        finished: bool = True,
        steps: Sequence[str] | None = None,
        judge: bool = True,
    ) -> Candidate:
        """Return a candidate with its answer, and judged if there is a verifier."""
        scores = self.judge([text] if steps is None else steps) if judge else ()
        score = aggregate(scores, self.how) if scores else None
        return Candidate(text, self.answer(text), tokens, finished, scores, score)

    def of(self, made: Completion, judge: bool = True) -> Candidate:
        """Return the candidate that one completion is."""
        return self.candidate(made.text, made.tokens, finished=made.finish != "length", judge=judge)

    def judge(self, steps: Sequence[str]) -> tuple[float, ...]:
        """Return the verifier's scores; () without one, or if it costs and the budget is spent.

        Equal candidates are judged once. Raises InputError for scores that are none.
        """
        key = tuple(steps)
        if self.verifier is None:
            return ()
        if key in self._scores:
            return self._scores[key]
        before = getattr(self.verifier, "tokens", None)
        if before is not None and self.spent:
            self.tell("unjudged", text="".join(steps))
            return ()
        found = tuple(self.verifier.score(self.problem, list(steps)))
        self.meter.used((getattr(self.verifier, "tokens", 0) or 0) - (before or 0))
        check_scores(found, self.verifier)
        self._scores[key] = found
        return found

    def value(self, steps: Sequence[str]) -> float:
        """Return the aggregate of the verifier's scores; 0 if it could not be asked any more."""
        scores = self.judge(steps)
        return aggregate(scores, self.how) if scores else 0.0

    def done(
        self,
        candidates: Sequence[Candidate],
        chosen: Candidate | None,
        answer: str | None = None,
    ) -> Scaled:
        """Return the result; its answer is the chosen candidate's unless another is given."""
        told = answer if answer is not None or chosen is None else chosen.answer
        return Scaled(told, chosen, tuple(candidates), self.meter.cost, tuple(self.events))


def check_scores(scores: Sequence[float], verifier: Any) -> None:
    """Raise InputError unless there are scores, all in [0, 1]."""
    if not scores:
        raise InputError(f"{type(verifier).__name__} gave no score; expected at least one")
    for score in scores:
        if math.isnan(score) or not 0 <= score <= 1:
            raise InputError(
                f"{type(verifier).__name__} gave the score {score}; scores lie in [0, 1]: squash "
                "or rescale them"
            )


def best_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the judged candidate with the highest score, else the first; finished ones first.

    The lowest index wins among equals. None of none.
    """
    if not candidates:
        return None
    pool = [one for one in candidates if one.finished] or list(candidates)
    judged = [one for one in pool if one.score is not None]
    if not judged:
        return pool[0]
    return max(judged, key=lambda one: one.score or 0.0)  # max keeps the first of equals


def holder(candidates: Sequence[Candidate], answer: str | None) -> Candidate | None:
    """Return the best candidate that gave an answer."""
    return best_of([one for one in candidates if one.answer == answer])

"""Tree of thoughts, breadth first: thoughts are proposed, valued in words, and the best b kept.

Yao et al., NeurIPS 2023, https://arxiv.org/abs/2305.10601, algorithm 1. Each of `levels` levels:

    generate   `propose`: one call a state, a thought a line;  `sample`: k calls a state
    evaluate   `value`: sum over `judgements` calls of impossible .001, likely 1, sure 20;
               `vote`: how many of them name the state;  `verifier`: its score
    select     the best `keep`, or so many drawn in proportion ("sample")

A state is the thoughts so far, a line each. A state that equals an earlier one of its level is
valued 0, as in the authors' code. The last level's best state is the answer's text. A value that
names none of the words counts 0.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pluribus.core.errors import InputError
from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling._prompts import check_fields, fill
from pluribus.decode.scaling._run import Run, best_of
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import (
    Candidate,
    Generator,
    Problem,
    Sampling,
    Scaled,
    Verifier,
)
from pluribus.decode.scaling.strategies import strategy
from pluribus.decode.scaling.strategies.particle_filtering import draw

PROPOSE = (
    "{question}\n\nSteps so far:\n{thoughts}\n\nPropose possible next steps, one a line, and "
    "nothing else."
)
SAMPLE = "{question}\n\nSteps so far:\n{thoughts}\n\nWrite the next step on one line."
VALUE = (
    "{question}\n\nSteps so far:\n{thoughts}\n\nCan these steps lead to the right answer? Reply "
    "with one word: sure, likely or impossible."
)
VOTE = (
    "{question}\n\nWhich of these is the most promising?\n{choices}\n\nReply with its number alone."
)
THOUGHTS = Sampling(temperature=0.7, max_tokens=512)
WORDS = {"impossible": 0.001, "likely": 1.0, "sure": 20.0}


@strategy("tree_of_thoughts", kind="hybrid", verifier="optional", paper="arXiv:2305.10601")
@dataclass(frozen=True, kw_only=True)
class TreeOfThoughts:
    """Searches a tree of thoughts that the model itself proposes and judges."""

    levels: PositiveInt = 3
    keep: PositiveInt = 5  # b
    generate: Literal["propose", "sample"] = "propose"
    k: PositiveInt = 5  # samples of a state, for "sample"
    evaluate: Literal["value", "vote", "verifier"] = "value"
    judgements: PositiveInt = 3
    select: Literal["greedy", "sample"] = "greedy"
    propose: str = PROPOSE  # with {question}, {thoughts}
    thought: str = SAMPLE
    value: str = VALUE
    vote: str = VOTE  # with {question}, {choices}
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = THOUGHTS

    def check(self) -> None:
        """Raise InputError for a template without its fields."""
        for name in ("propose", "thought", "value"):
            check_fields(f"tree_of_thoughts: {name}", getattr(self, name), ("question", "thoughts"))
        check_fields("tree_of_thoughts: vote", self.vote, ("question", "choices"))

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        if self.evaluate == "verifier" and verifier is None:
            raise InputError(
                "tree_of_thoughts: evaluate = 'verifier' needs a verifier; give one, or let the "
                "model judge: 'value' or 'vote'"
            )
        draws = self.k if self.generate == "sample" else 1
        run = Run(self, problem, generator, verifier, budget, draws=draws)
        chance = random.Random(self.sampling.seed)
        states: list[tuple[str, ...]] = [()]
        values: list[float] = [0.0]
        for level in range(self.levels):
            grown = [more for state in states for more in self._grow(run, state)]
            if not grown or run.spent:
                break
            valued = self._evaluate(run, grown)
            order = self._select(valued, chance)
            states, values = [grown[i] for i in order], [valued[i] for i in order]
            run.tell(
                "level",
                number=level,
                kept=["\n".join(state) for state in states],
                values=values,
                of=len(grown),
            )
        found: list[Candidate] = []
        for state, _ in zip(states, values, strict=True):
            if state:
                made = run.candidate("\n".join(state), 0, steps=state)
                found.append(made)
        top = best_of(found) if verifier is not None and found else (found[0] if found else None)
        return run.done(found, top)

    def _grow(self, run: Run, state: tuple[str, ...]) -> list[tuple[str, ...]]:
        prompt = fill(
            self.propose if self.generate == "propose" else self.thought,
            question=run.problem.question,
            thoughts="\n".join(state),
        )
        if self.generate == "propose":
            lines = [line for made in run.sample(1, prompt=prompt) for line in _lines(made.text)]
            return [(*state, line) for line in lines]
        return [
            (*state, line)
            for made in run.sample(self.k, prompt=prompt)
            for line in _lines(made.text)[:1]
        ]

    def _evaluate(self, run: Run, states: Sequence[tuple[str, ...]]) -> list[float]:
        if self.evaluate == "vote":
            return self._votes(run, states)
        values: list[float] = []
        seen: set[tuple[str, ...]] = set()
        for state in states:
            values.append(0.0 if state in seen else self._worth(run, state))
            seen.add(state)
        return values

    def _worth(self, run: Run, state: tuple[str, ...]) -> float:
        if self.evaluate == "verifier":
            return run.value(state)
        prompt = fill(self.value, question=run.problem.question, thoughts="\n".join(state))
        return sum(_word(made.text) for made in run.sample(self.judgements, prompt=prompt))

    def _votes(self, run: Run, states: Sequence[tuple[str, ...]]) -> list[float]:
        choices = "\n\n".join(
            f"Choice {i}:\n" + "\n".join(state) for i, state in enumerate(states, 1)
        )
        prompt = fill(self.vote, question=run.problem.question, choices=choices)
        counts = [0.0] * len(states)
        for made in run.sample(self.judgements, prompt=prompt):
            named = [int(number) for number in re.findall(r"\d+", made.text)]
            if named and 1 <= named[-1] <= len(states):
                counts[named[-1] - 1] += 1
        return counts

    def _select(self, values: Sequence[float], chance: random.Random) -> list[int]:
        """Return the places of what is kept, the best first."""
        order = sorted(range(len(values)), key=lambda i: -values[i])
        if self.select == "greedy" or sum(values) == 0:
            return order[: self.keep]
        drawn = draw(values, self.keep, chance)
        return sorted(drawn, key=lambda i: -values[i])


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _word(text: str) -> float:
    """Return the value of the last line's word; 0 if it names none."""
    said = (_lines(text) or [""])[-1].lower()
    found = [word for word in re.findall(r"[a-z]+", said) if word in WORDS]
    return WORDS[found[-1]] if found else 0.0

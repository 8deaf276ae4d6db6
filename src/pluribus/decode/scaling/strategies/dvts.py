"""Diverse verifier tree search: separate subtrees, in each of which the best step goes on.

Beeching et al. 2024 (search-and-learn), https://huggingface.co/spaces/HuggingFaceH4/blogpost-scaling-test-time-compute:
n / width subtrees; at every step each draws `width` continuations and keeps the best. Subtrees do
not compete. With a lookahead a step is judged after so many greedy steps more, of which nothing is
kept.

Differs from the authors' code, which returns all continuations of the last step, finished or not
(their issue 57): here only finished ones are candidates, those of earlier steps included. If there
is none, the best path is finished.
"""

from dataclasses import dataclass, replace
from typing import Literal

from pluribus.core.errors import InputError
from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling import _steps
from pluribus.decode.scaling._run import Run, best_of
from pluribus.decode.scaling._steps import Path
from pluribus.decode.scaling.answers import check_separator
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.strategies import strategy
from pluribus.decode.scaling.strategies.beam_search import check_division


@strategy("dvts", kind="hybrid", verifier="required", continues=True, paper="arXiv:2408.03314")
@dataclass(frozen=True, kw_only=True)
class DVTS:
    """Follows the best step in each of several trees."""

    n: PositiveInt = 16  # continuations a step, in all trees
    width: PositiveInt = 4  # continuations of one tree
    lookahead: int = 0  # greedy steps more before a step is judged
    rounds: PositiveInt = 40
    separator: str = "\n\n"
    step_tokens: PositiveInt = 512
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for an empty separator, a lookahead below 0, or what doesn't divide."""
        check_separator(self.separator)
        check_division("dvts", self.n, self.width)
        if self.lookahead < 0:
            raise InputError(f"dvts: lookahead = {self.lookahead}; give 0 or more steps")

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget, draws=self.n)
        trees = [Path()] * (self.n // self.width)
        finished: list[Path] = []
        for number in range(self.rounds):
            going = [i for i, path in enumerate(trees) if not path.ended]
            if not going or run.spent:
                break
            for i in going:
                own = _steps.extend(
                    run,
                    [trees[i]] * self.width,
                    self.separator,
                    most=self.step_tokens,
                    whole=number == self.rounds - 1,
                )
                own = [self._judged(run, path) for path in own]
                finished += [path for path in own if path.ended and not path.cut]
                if own:
                    trees[i] = max(own, key=lambda path: path.score)  # the first of equals
            run.tell("round", kept=[path.text for path in trees], finished=len(finished))
        if not finished:
            finished = _steps.to_the_end(
                run, [path for path in trees if not path.ended] or trees, self.separator
            )
        found = [_steps.candidate(run, path) for path in finished if path.steps]
        return run.done(found, best_of(found))

    def _judged(self, run: Run, path: Path) -> Path:
        ahead = path
        for _ in range(self.lookahead):
            if ahead.ended:
                break
            made = run.sample(
                1,
                prefix=ahead.text,
                temperature=0.0,
                stop=(*run.sampling.stop, self.separator),
                max_tokens=self.step_tokens,
            )
            if not made:
                break
            parted = made[0].finish == "stop" and bool(made[0].text.strip())
            step = made[0].text + self.separator * parted
            ahead = replace(ahead, steps=(*ahead.steps, step), ended=not parted)
        return replace(path, score=run.value(ahead.steps)) if ahead.steps else path

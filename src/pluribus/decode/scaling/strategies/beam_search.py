"""Beam search over steps: n beams, of which a verifier keeps n / width to be extended anew.

Snell et al. 2024, https://arxiv.org/abs/2408.03314, section 5.2, as search-and-learn does it:

    if fewer than n beams are active, they are repeated in turn; each gets one step; those that
    ended leave; of the rest the best n / width stay. The last round runs to the end.

The best of all that finished wins, not the first n that did. Copies of a beam are drawn in one
request above temperature 0 and differ, so copying is never for nothing; with `distinct` beams that
still have the same text are kept once. Beams that end are not extended any more: each token is
written once and counted once. If none finishes within the budget, the best one is.
"""

from dataclasses import dataclass
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


@strategy(
    "beam_search",
    kind="hybrid",
    verifier="required",
    continues=True,
    paper="arXiv:2408.03314",
)
@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Searches by steps with a verifier."""

    n: PositiveInt = 16  # beams
    width: PositiveInt = 4  # extensions of each that is kept
    rounds: PositiveInt = 40
    separator: str = "\n\n"  # ends a step
    step_tokens: PositiveInt = 512
    distinct: bool = False  # equal texts count once
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for an empty separator, or beams that don't divide by the width."""
        check_separator(self.separator)
        check_division("beam_search", self.n, self.width)

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget, draws=self.n)
        active, done = [Path()], []
        for number in range(self.rounds):
            beams = [active[i % len(active)] for i in range(max(self.n, len(active)))]
            last = number == self.rounds - 1
            grown = _steps.extend(run, beams, self.separator, most=self.step_tokens, whole=last)
            grown = _steps.judged(run, grown)
            done += [path for path in grown if path.ended]
            rest = [path for path in grown if not path.ended]
            if self.distinct:
                rest = list({path.text: path for path in rest}.values())
            rest.sort(key=lambda path: -path.score)  # stable: the first of equals stays first
            run.tell(
                "round",
                active=[path.text for path in rest],
                scores=[path.score for path in rest],
                finished=len(done),
            )
            active = rest[: self.n // self.width] or ([] if grown else active)
            if not active or run.spent:
                break
        if not any(not path.cut for path in done):
            done += _steps.to_the_end(run, active, self.separator)
        found = [_steps.candidate(run, path) for path in done]
        return run.done(found, best_of(found))


def check_division(name: str, n: int, width: int) -> None:
    """Raise InputError unless n is a multiple of the width."""
    if n % width:
        near = max(width, n // width * width)
        raise InputError(
            f"{name}: n = {n} is no multiple of width = {width}; give n = {near} or "
            f"{near + width}, or another width"
        )

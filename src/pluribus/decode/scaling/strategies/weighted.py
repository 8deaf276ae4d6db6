"""Weighted best of n: the answer with the largest sum of scores.

Li et al., ACL 2023, https://arxiv.org/abs/2206.02336: argmax_a sum_{i : ans_i = a} score_i. Many
fair samples of one answer go before a single excellent one of another; the text that is shown is
the best with that answer.
"""

from dataclasses import dataclass
from typing import Literal

from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling import answers
from pluribus.decode.scaling._run import Run, holder
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.strategies import strategy


@strategy("weighted", kind="parallel", verifier="required", pooled=True, paper="arXiv:2206.02336")
@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Takes the answer whose samples score most together."""

    n: PositiveInt = 16
    aggregate: Literal["last", "min", "prod"] = "last"  # of step scores
    sampling: Sampling = DRAWN

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget, draws=self.n)
        found = [run.of(made) for made in run.sample(self.n)]
        answer = answers.weighted(
            [one.answer for one in found], [one.score or 0.0 for one in found]
        )
        return run.done(found, holder(found, answer), answer)

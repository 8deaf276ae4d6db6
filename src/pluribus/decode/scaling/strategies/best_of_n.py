"""Best of n: the sample that a verifier likes best.

Cobbe et al. 2021, https://arxiv.org/abs/2110.14168. argmax_i aggregate(scores_i), the lowest index
of equals. A sample that was cut at max_tokens is chosen only if none ended.
"""

from dataclasses import dataclass
from typing import Literal

from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling._run import Run, best_of
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.strategies import strategy


@strategy("best_of_n", kind="parallel", verifier="required", pooled=True, paper="arXiv:2110.14168")
@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Takes the best of n samples."""

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
        return run.done(found, best_of(found))

"""Samples of which the first is the answer: what every other strategy is compared with.

The others tell pass@k: see `measures.pass_at_k`.
"""

from dataclasses import dataclass

from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling._run import Run
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.strategies import strategy


@strategy("sample", kind="parallel", pooled=True)
@dataclass(frozen=True, kw_only=True)
class Sample:
    """Takes the first completion as it is."""

    n: PositiveInt = 1
    sampling: Sampling = DRAWN

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`. A verifier is not asked."""
        run = Run(self, problem, generator, None, budget, draws=self.n)
        found = [run.of(made) for made in run.sample(self.n)]
        return run.done(found, found[0] if found else None)

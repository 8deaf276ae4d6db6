"""Self-consistency: the answer that most samples give, stopping early once that is settled.

Wang et al., ICLR 2023, https://arxiv.org/abs/2203.11171; the stop is adaptive consistency, Aggarwal
et al. 2023, https://arxiv.org/abs/2305.11860, section 3:

    answer = argmax_a |{i : ans_i = a}|
    stop when I_{1/2}(v2 + 1, v1 + 1) >= confidence, v1 >= v2 the two largest counts

A sample without an answer never wins unless there is no other. Among equals the first seen wins
(`tie="first"`), or one by chance ("random"). Samples without an answer don't count for the stop.
"""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from pluribus.core.merger import Fraction, PositiveInt
from pluribus.decode.scaling._run import Run, holder
from pluribus.decode.scaling.answers import majority, sure
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import (
    DRAWN,
    Candidate,
    Generator,
    Problem,
    Sampling,
    Scaled,
    Verifier,
)
from pluribus.decode.scaling.strategies import strategy


@strategy("self_consistency", kind="parallel", pooled=True, paper="arXiv:2203.11171")
@dataclass(frozen=True, kw_only=True)
class SelfConsistency:
    """Takes the answer that most of up to n samples give."""

    n: PositiveInt = 16
    confidence: Fraction | None = None  # stop once this sure; None takes all n in one request
    tie: Literal["first", "random"] = "first"
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
        if self.confidence is None:
            found = [run.of(made) for made in run.sample(self.n)]
        else:
            found = self._one_by_one(run, self.confidence)
        chance = random.Random(self.sampling.seed) if self.tie == "random" else None
        answer = majority([one.answer for one in found], chance)
        return run.done(found, holder(found, answer), answer)

    def _one_by_one(self, run: Run, confidence: float) -> list[Candidate]:
        found: list[Candidate] = []
        counts: Counter[str] = Counter()
        while len(found) < self.n and (made := run.sample(1)):
            found.append(run.of(made[0]))
            if found[-1].answer is not None:
                counts[found[-1].answer] += 1
            (_, first), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
            if sure(first, second) >= confidence:
                run.tell("settled", samples=len(found), first=first, second=second)
                break
        return found

"""Revision chains and a vote: parallel chains in which the model revises its answer.

Snell et al. 2024, https://arxiv.org/abs/2408.03314, section 6: `chains` chains of `length` answers,
each shown those before it. Within a chain the verifier chooses (without one, the last answer
stands), then the chosen ones vote, weighted by their scores.
"""

from dataclasses import dataclass
from typing import Literal

from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling._prompts import check_fields, fill
from pluribus.decode.scaling._run import Run, best_of, holder
from pluribus.decode.scaling.answers import weighted
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

REVISE = "{question}\n\nEarlier attempts, which may be wrong:\n{attempts}\n\nAnswer anew."


@strategy("revision_chains", kind="sequential", verifier="optional", paper="arXiv:2408.03314")
@dataclass(frozen=True, kw_only=True)
class RevisionChains:
    """Revises in several chains and votes across them."""

    chains: PositiveInt = 4
    length: PositiveInt = 4  # answers of a chain, the first included
    shown: PositiveInt = 4  # how many earlier ones a revision sees
    revise: str = REVISE  # with {question}, {attempts}
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for a template without its fields."""
        check_fields("revision_chains: revise", self.revise, ("question", "attempts"))

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget, draws=self.chains)
        chains = [[run.of(made)] for made in run.sample(self.chains)]
        for _ in range(self.length - 1):
            for chain in chains:
                before = [one.text for one in chain[-self.shown :]]
                prompt = fill(
                    self.revise,
                    question=run.problem.question,
                    attempts="\n\n".join(f"{i}. {text}" for i, text in enumerate(before, 1)),
                )
                chain += [run.of(made) for made in run.sample(1, prompt=prompt)]
        chosen: list[Candidate] = []
        for chain in chains:
            kept = best_of(chain) if verifier is not None else chain[-1]
            assert kept is not None  # every chain begins with a sample
            chosen.append(kept)
        weights = [1.0 if one.score is None else one.score for one in chosen]
        answer = weighted([one.answer for one in chosen], weights)
        run.tell("chains", answers=[[one.answer for one in chain] for chain in chains])
        everything = [one for chain in chains for one in chain]
        return run.done(everything, holder(chosen, answer), answer)

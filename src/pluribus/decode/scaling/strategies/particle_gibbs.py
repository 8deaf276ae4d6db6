"""Particle Gibbs: particle filtering again and again, each time beside the best found before.

Puri et al. 2025, https://arxiv.org/abs/2502.01618, section 3.3; Andrieu et al. 2010. After a pass,
references are drawn from softmax(w); in the next pass they take part with the steps they had, are
never lost, and may be drawn from. The particle with the largest last weight of the last pass wins.
"""

import random
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
from pluribus.decode.scaling.strategies.particle_filtering import (
    draw,
    filtered,
    log_weights,
    softmax,
)


@strategy(
    "particle_gibbs", kind="hybrid", verifier="required", continues=True, paper="arXiv:2502.01618"
)
@dataclass(frozen=True, kw_only=True)
class ParticleGibbs:
    """Repeats particle filtering around references."""

    n: PositiveInt = 8  # particles of a pass, references included
    passes: PositiveInt = 2
    references: PositiveInt = 1
    rounds: PositiveInt = 40
    separator: str = "\n\n"
    step_tokens: PositiveInt = 512
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for an empty separator, or references that leave no free particle."""
        check_separator(self.separator)
        if self.references >= self.n:
            raise InputError(
                f"particle_gibbs: {self.references} references leave none of {self.n} particles "
                f"free; give at most {self.n - 1}"
            )

    def run(
        self,
        problem: str | Problem,
        generator: Generator,
        verifier: Verifier | None = None,
        budget: Budget | None = None,
    ) -> Scaled:
        """See `Strategy`."""
        run = Run(self, problem, generator, verifier, budget, draws=self.n)
        chance = random.Random(self.sampling.seed)
        particles: list[Path] = []
        held: list[Path] = []
        for number in range(self.passes):
            if number and run.spent:
                break
            particles = filtered(
                run,
                chance,
                n=self.n,
                rounds=self.rounds,
                separator=self.separator,
                step_tokens=self.step_tokens,
                references=held,
            )
            weights = softmax(log_weights(particles))
            held = [particles[i] for i in draw(weights, self.references, chance)]
            run.tell("pass", weights=weights, kept=[path.text for path in held])
        if not any(path.ended and not path.cut for path in particles):
            particles = particles + _steps.to_the_end(run, particles, self.separator)
        found = [_steps.candidate(run, path) for path in particles if path.steps]
        return run.done(found, best_of(found))

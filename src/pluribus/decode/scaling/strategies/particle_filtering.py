"""Particle filtering: steps are resampled by their scores, so weak ones still have a chance.

Puri et al. 2025, https://arxiv.org/abs/2502.01618, algorithm 1, as its-hub does it:

    every unfinished particle gets a step;  w_i = logit(score_i), clipped to [1e-7, 1 - 1e-7]
    n particles drawn with replacement from softmax(w) over all;  until all have ended

Finished particles keep their last weight and take part in the draws, but are not extended: only new
tokens are written and counted. Draws invert the cumulative sum of the weights at uniform numbers of
`random.Random(seed)`, one a particle. The particle with the largest last weight wins.
"""

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pluribus.core.merger import PositiveInt
from pluribus.decode.scaling import _steps
from pluribus.decode.scaling._run import Run, best_of
from pluribus.decode.scaling._steps import Path
from pluribus.decode.scaling.answers import check_separator
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import DRAWN, Generator, Problem, Sampling, Scaled, Verifier
from pluribus.decode.scaling.strategies import strategy

EPSILON = 1e-7


@strategy(
    "particle_filtering",
    kind="hybrid",
    verifier="required",
    continues=True,
    paper="arXiv:2502.01618",
)
@dataclass(frozen=True, kw_only=True)
class ParticleFiltering:
    """Resamples partial answers by their scores."""

    n: PositiveInt = 16  # particles
    rounds: PositiveInt = 40
    separator: str = "\n\n"
    step_tokens: PositiveInt = 512
    aggregate: Literal["last", "min", "prod"] = "last"
    sampling: Sampling = DRAWN

    def check(self) -> None:
        """Raise InputError for an empty separator."""
        check_separator(self.separator)

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
        particles = filtered(
            run,
            chance,
            n=self.n,
            rounds=self.rounds,
            separator=self.separator,
            step_tokens=self.step_tokens,
        )
        if not any(path.ended and not path.cut for path in particles):
            particles = particles + _steps.to_the_end(run, particles, self.separator)
        found = [_steps.candidate(run, path) for path in particles if path.steps]
        return run.done(found, best_of(found))


def log_weights(paths: Sequence[Path]) -> list[float]:
    """Return the logits of the particles' scores, clipped."""
    clipped = [min(max(path.score, EPSILON), 1 - EPSILON) for path in paths]
    return [math.log(score) - math.log1p(-score) for score in clipped]


def softmax(logs: Sequence[float]) -> list[float]:
    """Return the weights that logarithms stand for, with sum 1."""
    top = max(logs)
    raw = [math.exp(value - top) for value in logs]
    total = sum(raw)
    return [value / total for value in raw]


def draw(weights: Sequence[float], count: int, chance: random.Random) -> list[int]:
    """Return indices drawn with replacement, one for each uniform number."""
    sums = list(itertools.accumulate(weights))
    return [
        min(bisect_right(sums, chance.random() * sums[-1]), len(sums) - 1) for _ in range(count)
    ]


def filtered(
    run: Run,
    chance: random.Random,
    *,
    n: int,
    rounds: int,
    separator: str,
    step_tokens: int,
    references: Sequence[Path] = (),
) -> list[Path]:
    """Return the particles when all have ended; the first are the references, kept as they are.

    A reference takes part as far as the round has come: its first steps, then all of it.
    """
    particles = [Path()] * (n - len(references))
    for number in range(rounds):
        if number and all(path.ended for path in particles):
            break
        grown = _steps.extend(
            run, particles, separator, most=step_tokens, whole=number == rounds - 1
        )
        held = [_upto(reference, number + 1) for reference in references]
        everything = _steps.judged(run, [*held, *grown])
        if len(grown) < len(particles):  # the budget is spent
            return everything if grown else [*references, *particles]
        weights = softmax(log_weights(everything))
        run.tell(
            "round",
            weights=weights,
            texts=[path.text for path in everything],
            ended=[path.ended for path in everything],
        )
        if all(path.ended for path in everything):
            return everything
        particles = [everything[i] for i in draw(weights, len(grown), chance)]
    return [*references, *particles]


def _upto(path: Path, steps: int) -> Path:
    if steps >= len(path.steps):
        return path
    return Path(path.steps[:steps])

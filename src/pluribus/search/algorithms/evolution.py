"""Regularised evolution: mutate the best of a few, forget the oldest.

Real et al., AAAI 2019, https://arxiv.org/abs/1802.01548, algorithm 1; pyglove's
`evolution.regularized_evolution`.

    population_size random points; then, for each trial:
    parent = best of tournament_size members drawn without replacement
    child  = parent with one choice made anew; it joins, the oldest member leaves

Differs from the paper: populations of 20, for studies of tens of trials rather than thousands. With
`spread` four in five mutations of floats are a step instead, normal with a standard deviation of
`spread` times the range. A child differs from its parent, as in the paper; pyglove's mutator, which
`spread=0` leaves alone, may draw the value that was there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.core.errors import InputError
from pluribus.core.merger import NonNegative, PositiveInt
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm
from pluribus.search.algorithms._mutation import mutator
from pluribus.search.space import Space
from pluribus.search.study import Objective


@algorithm("evolution", paper="arXiv:1802.01548")
@dataclass(frozen=True, kw_only=True)
class Evolution:
    """An aging population."""

    population_size: PositiveInt = 20
    tournament_size: PositiveInt = 5
    spread: NonNegative = 0.1

    def check(self) -> None:
        """Raise InputError for tournaments that the population can't fill."""
        if not 2 <= self.tournament_size <= self.population_size:
            raise InputError(
                f"evolution: tournament_size = {self.tournament_size} must lie between 2 and "
                f"population_size = {self.population_size}"
            )

    def generator(self, space: Space, objectives: Sequence[Objective], seed: int) -> Any:
        """Return pyglove's generator."""
        return pg.evolution.regularized_evolution(
            mutator(self.spread, seed), self.population_size, self.tournament_size, seed=seed
        )

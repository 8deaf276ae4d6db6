"""NSGA-II: a population sorted into fronts, the crowded parts thinned.

Deb et al., IEEE Transactions on Evolutionary Computation 6 (2002), sections III A and B; pyglove's
`evolution.nsga2`, which mutates and does not recombine, with a crossover put in between.

    elites = the first population_size of (elites + as many new points), by front, then by the
             distance to their neighbours on it
    child  = the next elite in turn; with chance `crossover` each of its choices is that of a random
             elite with chance 1/2; then one choice is made anew

Differs from the paper: parents take turns instead of tournaments, choices are crossed whole and not
by SBX. The first 2 population_size points are random. `spread` as in evolution; `spread=0,
crossover=0` is pyglove alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.core.merger import NonNegative, PositiveInt, Share
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm
from pluribus.search.algorithms._mutation import Mate, mutator
from pluribus.search.space import Space
from pluribus.search.study import Objective


@algorithm("nsga2", paper="doi:10.1109/4235.996017", many=True)
@dataclass(frozen=True, kw_only=True)
class Nsga2:
    """Fronts of several objectives."""

    population_size: PositiveInt = 10
    spread: NonNegative = 0.1
    crossover: Share = 0.9

    def generator(self, space: Space, objectives: Sequence[Objective], seed: int) -> Any:
        """Return pyglove's generator."""
        made = pg.evolution.nsga2(mutator(self.spread, seed), self.population_size, seed=seed)
        if self.crossover:
            elite, mutate = made.reproduction.ops
            mate = Mate(share=self.crossover, seed=seed)
            made.rebind(reproduction=elite.clone() >> mate >> mutate.clone())
        return made

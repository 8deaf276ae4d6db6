"""Hill climbing: mutate the best point found so far.

pyglove's `evolution.hill_climb`; `batch_size` mutants are made of the best before it is looked for
again. `spread` as in evolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.core.merger import NonNegative, PositiveInt
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm
from pluribus.search.algorithms._mutation import mutator
from pluribus.search.space import Space
from pluribus.search.study import Objective


@algorithm("hill")
@dataclass(frozen=True, kw_only=True)
class Hill:
    """Mutants of the best."""

    batch_size: PositiveInt = 1
    start: PositiveInt = 5  # random points before the climb
    spread: NonNegative = 0.1

    def generator(self, space: Space, objectives: Sequence[Objective], seed: int) -> Any:
        """Return pyglove's generator."""
        return pg.evolution.hill_climb(
            mutator(self.spread, seed), self.batch_size, self.start, seed=seed
        )

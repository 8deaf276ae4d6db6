"""CMA-ES: a normal distribution that learns where the good points are.

Hansen, "The CMA Evolution Strategy: A Tutorial", https://arxiv.org/abs/1604.00772; the package
`cma`. What mergekit-evolve and mergenetic search merges with. Every choice becomes coordinates of
the unit cube:

    float          one, linear or logarithmic between its ends as `scale` says
    ordered        one, cut into as many even parts as there are candidates, if these are numbers
                   that rise or fall
    other choices  one a candidate; the largest (the k largest) coordinates name the chosen

A choice that isn't active at a point leaves its coordinates without a say. Starts in the middle
with a standard deviation of `sigma`. Scores are used as they come: the strategy moves on as soon as
it knows `population_size` of them.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.core.merger import Positive, PositiveInt
from pluribus.core.optional import optional
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm
from pluribus.search.algorithms._cube import Cube
from pluribus.search.space import Space
from pluribus.search.study import Objective


@algorithm("cma", paper="arXiv:1604.00772")
@dataclass(frozen=True, kw_only=True)
class Cma:
    """An adapting normal distribution."""

    sigma: Positive = 0.25
    population_size: PositiveInt | None = None  # None: 4 + 3 ln(coordinates)

    def generator(self, space: Space, objectives: Sequence[Objective], seed: int) -> Any:
        """Return a generator. Raises ExtraError without the package."""
        return _Strategy(sigma=self.sigma, population_size=self.population_size, seed=seed)


@pg.members(
    [
        ("sigma", pg.typing.Float()),
        ("population_size", pg.typing.Int().noneable()),
        ("seed", pg.typing.Int()),
    ]
)
class _Strategy(pg.DNAGenerator):
    """Asks the strategy for one place at a time and tells it of a population at a time."""

    def _setup(self) -> None:
        self._cube = Cube(self.dna_spec)
        self._begin([0.5] * len(self._cube), self.sigma)

    def _begin(self, middle: Sequence[float], sigma: float) -> None:
        cma = optional("cma", "search", 'algorithm="cma"')
        import numpy as np

        rng = np.random.default_rng(self.seed)
        options = {
            "bounds": [0, 1],
            "verbose": -9,
            "seed": math.nan,  # numpy's global generator is the user's
            "randn": lambda *shape: rng.standard_normal(shape),
        }
        if self.population_size is not None:
            options["popsize"] = max(2, self.population_size)
        # CMA-ES needs two axes: a lone coordinate gets a mute companion.
        start = [*middle, 0.5] if len(middle) == 1 else list(middle)
        self._strategy = cma.CMAEvolutionStrategy(start, sigma, options)
        self._asked: deque[Any] = deque()
        self._places: dict[str, Any] = {}
        self._told: list[tuple[Any, float]] = []

    def _propose(self) -> Any:
        if not self._asked:
            self._asked.extend(self._strategy.ask())
        place = self._asked.popleft()
        dna = self._cube.point(place.tolist())
        self._places[str(self._num_proposals)] = place
        dna.set_metadata("place", str(self._num_proposals))
        return dna

    def _feedback(self, dna: Any, reward: float) -> None:
        place = self._places.pop(dna.metadata.place)
        self._told.append((place, -reward))
        size = self._strategy.popsize
        if len(self._told) >= size:
            places, losses = zip(*self._told[:size], strict=True)
            self._strategy.tell(list(places), list(losses))
            self._told = self._told[size:]

    def recover(self, history: Any) -> None:
        """Begin again around the best point of a history that another algorithm made."""
        known = [(dna, reward) for dna, reward in history if reward is not None]
        best = max(known, key=lambda pair: pair[1])[0]
        self._begin(self._cube.place(best), self.sigma / 2)

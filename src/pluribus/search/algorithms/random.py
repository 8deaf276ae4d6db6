"""Random search: every point drawn independently of what was found.

pyglove's `geno.Random`; floats are drawn evenly between their ends, candidates with equal chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm
from pluribus.search.space import Space
from pluribus.search.study import Objective


@algorithm("random", feedback=False, many=True)
@dataclass(frozen=True, kw_only=True)
class Random:
    """Independent draws."""

    def generator(self, space: Space, objectives: Sequence[Objective], seed: int) -> Any:
        """Return pyglove's generator."""
        return pg.geno.Random(seed=seed)

"""Sweep: every point of a finite space once, in order.

pyglove's `geno.Sweeping`; the last choice turns fastest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pluribus.core.errors import InputError, listing
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm
from pluribus.search.space import Space
from pluribus.search.study import Objective


@algorithm("sweep", feedback=False, many=True)
@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All points."""

    def generator(self, space: Space, objectives: Sequence[Objective], seed: int) -> Any:
        """Return pyglove's generator. Raises InputError for a space with floats."""
        if space.size < 0:
            floats = [path for path, offer in space.decisions.items() if offer.startswith("float")]
            raise InputError(
                f"a sweep tries every point, but {listing(floats)} can be any number in a range: "
                "list the values to try with oneof, or use random, cma or evolution"
            )
        return pg.geno.Sweeping()

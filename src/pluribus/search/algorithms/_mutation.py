"""What the evolutionary algorithms do to a parent."""

import random
from typing import Any

from pluribus.search._pyglove import pg

STEPS = 0.8  # share of the mutations of floats that move it a little
REDRAWS = 20  # of a mutant that equals its parent: a space of one point has no other


def mutator(spread: float, seed: int) -> Any:
    """Return pyglove's uniform mutator, or with a spread `Near`."""
    uniform = pg.evolution.mutators.Uniform(seed=seed)
    return Near(spread=spread, seed=seed) if spread else uniform


@pg.members(
    [
        ("spread", pg.typing.Float(min_value=0.0), "Standard deviation over the range."),
        ("seed", pg.typing.Int(), "Random seed."),
    ]
)
class Near(pg.evolution.Mutator):
    """Make one choice anew, so that it changes; or move a float a little.

    pyglove's Uniform may draw the value that was there: it is asked again then. Of the mutations
    that hit a float four in five are steps; one that leaves the range is folded back into it.
    """

    def _on_bound(self) -> None:
        super()._on_bound()
        self._uniform = pg.evolution.mutators.Uniform(seed=self.seed)
        self._random = random.Random(f"near {self.seed}")

    def mutate(self, dna: Any, step: int = 0) -> Any:
        """Return a mutant; the parent stays as it is."""
        places = [str(point.id) for point in _active(dna)]
        floats = [str(p.id) for p in _active(dna) if isinstance(p, pg.geno.Float)]
        if floats and self._random.random() < STEPS * len(floats) / len(places):
            return self._nudged(dna, self._random.choice(floats))
        for _ in range(REDRAWS):
            child = self._uniform.mutate(dna, step)
            if child != dna:
                break
        return child

    def _nudged(self, dna: Any, place: str) -> Any:
        child = dna.clone(deep=True)
        node = child[place]
        low, high = node.spec.min_value, node.spec.max_value
        value = node.value + self._random.gauss(0.0, self.spread * (high - low))
        node.rebind(value=_folded(value, low, high), skip_notification=True)
        return child


@pg.members(
    [
        ("share", pg.typing.Float(min_value=0.0, max_value=1.0), "Of parents that mate."),
        ("seed", pg.typing.Int(), "Random seed."),
    ]
)
class Mate(pg.evolution.Operation):
    """Cross a parent with a random elite, each choice from one of them: pyglove's Uniform."""

    def _on_bound(self) -> None:
        super()._on_bound()
        self._cross = pg.evolution.recombinators.Uniform(seed=self.seed)
        self._random = random.Random(f"mate {self.seed}")

    def call(self, inputs: Any, global_state: Any, step: int = 0) -> Any:
        """Return one child, or the parent itself if it doesn't mate."""
        parent = inputs[0]
        if self._random.random() >= self.share:
            return [parent]
        other = self._random.choice(global_state.elites)
        return self._cross([parent, other], global_state=global_state, step=step)[:1]


def _active(dna: Any) -> list[Any]:
    """Return the decision points that have a say at a point, in their order."""
    return list(dna.to_dict(key_type="dna_spec", multi_choice_key="parent"))


def _folded(value: float, low: float, high: float) -> float:
    """Reflect a value at the ends of its range until it lies within."""
    if low == high:
        return low
    turns = (value - low) % (2 * (high - low))
    return low + min(turns, 2 * (high - low) - turns)

"""What the merging claims share: a zoo, merges of it in memory, scores, choices by validation."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pluribus.claims import OnStep
from pluribus.core.pool import Pool
from pluribus.engine.driver import merge
from pluribus.tasks import zoo as zoos

State = dict[str, Tensor]
GRID = tuple(round(0.1 * step, 1) for step in range(1, 11))  # 0.1 ... 1.0


class Bed:
    """A zoo and what can be made of it."""

    def __init__(self, zoo: zoos.Zoo, tasks: Sequence[str] | None = None) -> None:
        self.zoo = zoo
        self.tasks = list(tasks or zoo.tasks)

    def merged(self, method: Any, tasks: Sequence[str] | None = None, seed: int = 0) -> State:
        """Merge the experts of some tasks (all by default)."""
        names = tasks or self.tasks
        pool = Pool(self.zoo.base, {task: self.zoo.experts[task] for task in names})
        weights = merge(pool, method, seed=seed)
        return {name: weights[name] for name in weights}

    def update(self, method: Any, tasks: Sequence[str] | None = None, seed: int = 0) -> State:
        """Return what a merge adds to the base."""
        merged = self.merged(method, tasks, seed)
        return {name: merged[name] - self.zoo.base[name] for name in merged}

    def at(self, update: State, scale: float) -> State:
        """Return base + scale * update."""
        return {name: self.zoo.base[name] + scale * update[name] for name in update}

    def score(self, state: State, split: str = "test", tasks: Sequence[str] | None = None) -> float:
        """Return the mean normalised accuracy over tasks, in percent."""
        names = tasks or list(self.zoo.tasks)
        ceilings = self.zoo.expert_scores(split)  # type: ignore[arg-type]
        scores = [self.zoo.score(state, t, split) / ceilings[t] for t in names]  # type: ignore[arg-type]
        return 100 * sum(scores) / len(scores)

    def best_scale(
        self, update: State, grid: Iterable[float] = GRID, tasks: Sequence[str] | None = None
    ) -> tuple[float, State]:
        """Choose the scale of an update on validation data; return it and the weights."""
        scored = [(self.score(self.at(update, s), "val", tasks), -s) for s in grid]
        scale = -max(scored)[1]
        return scale, self.at(update, scale)

    def tuned(self, method: Any, grid: Iterable[float] = GRID) -> float:
        """Return the test score of a merge whose scale is chosen on validation data."""
        return self.score(self.best_scale(self.update(method), grid)[1])


@lru_cache(maxsize=1)
def merge8(seed: int, on_step: OnStep | None = None) -> Bed:
    """Return the bed of the tall-masks page."""
    torch.manual_seed(seed)  # nothing below draws from it; a stray draw would still repeat
    return Bed(zoos.build("merge8", seed, on_step=on_step))


DATA = (
    "merge8: eight 10-class tasks on 28x28 digit images (MNIST and scikit-learn's), 500 test each"
)
MODEL = "residual MLP, 3.56 M parameters, eight fine-tunes of one base"
METRIC = "accuracy over the specialist's own, mean of 8 tasks, percent"

"""Spaces in which only scales vary: one merge, then base + scale * update for every point.

The trick of `pluribus.scale.search_scale`. It holds for a recipe of one method with a base, whose
placeholders all stand at `lambda` (`scale`) of the parameters, or for task arithmetic without
`normalize` also at a model's `weight`. The first point is merged as the engine does it, too, and if
the two differ by more than the rounding of their updates explains, every point is.
"""

import re
from collections.abc import Mapping
from typing import Any

from pluribus.core.merger import facts
from pluribus.core.pool import Pool
from pluribus.core.refs import ModelRef
from pluribus.core.registry import MERGERS
from pluribus.recipe.schema import Recipe
from pluribus.scale import _Models

SCALE = re.compile(r"parameters\.(lambda|scale)")
WEIGHT = re.compile(r"models\[\d+\]\.parameters\.weight")
KEYS = {"merge_method", "base_model", "models", "parameters", "seed", "name"}


def only_scales(decisions: Mapping[str, str], first: Recipe) -> bool:
    """Return whether all that a space of recipes leaves open are scales of one merge.

    `decisions` are the space's, `first` is the recipe at any of its points.
    """
    if set(first.plain()) - KEYS or first.merge_method not in MERGERS or not first.models:
        return False
    known = facts(MERGERS[first.merge_method])
    if known.base != "required" or first.base_model is None or known.needs:
        return False
    if known.random and first.seed is None:  # another recipe, another draw
        return False
    if any(entry.extras or set(entry.parameters) - {"weight"} for entry in first.models):
        return False
    values = [*first.parameters.values(), *(v for e in first.models for v in e.parameters.values())]
    if not all(isinstance(value, int | float | str) for value in values):
        return False
    by_weight = known.name == "task_arithmetic" and not first.parameters.get("normalize")
    return bool(decisions) and all(
        SCALE.fullmatch(path) or (by_weight and WEIGHT.fullmatch(path)) for path in decisions
    )


class Scales:
    """Merged weights by recipe, for recipes that differ in scales alone."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self._models: _Models | None = None

    @property
    def merges(self) -> int:
        """Merges that were run."""
        return 0 if self._models is None else self._models.merges

    def state(self, recipe: Recipe) -> dict[str, Any]:
        """Return the merged weights as tensors by name."""
        assert recipe.models is not None
        experts = [e for e in recipe.models if e.model != recipe.base_model]
        weights = [float(e.parameters.get("weight", 1.0)) for e in experts]
        settings = {k: v for k, v in recipe.parameters.items() if k not in ("lambda", "scale")}
        if self._models is None:
            method = MERGERS.build(recipe.merge_method, settings)
            if any("weight" in e.parameters for e in experts):
                method = MERGERS.build(recipe.merge_method, {**settings, "weight": tuple(weights)})
            opened = {str(e.model): self._objective.open_model(e.model) for e in experts}
            base = self._objective.open_model(_base(recipe))
            seeded = {"seed": recipe.drawn_seed}
            self._models = _Models(method, Pool(base, opened), seeded)
        given = recipe.parameters.get("lambda", recipe.parameters.get("scale"))
        point = {} if given is None else {"scale": float(given)}
        if self._models.inner("weight[0]"):
            point |= {f"weight[{i}]": weight for i, weight in enumerate(weights)}
        return self._models.at(point, len(weights) + 2)


def _base(recipe: Recipe) -> ModelRef:
    assert recipe.base_model is not None
    return recipe.base_model

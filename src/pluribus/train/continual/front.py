"""Checkpoints for preferences: fine-tunes of one base, weighed by a preference and merged.

Ours, after IBCL's zero-shot models (https://arxiv.org/abs/2310.02995, algorithm 2): the experts'
weights stand where IBCL has posteriors' means.

    theta(w) = merge(base, experts, weight_i = total * w_i),  sum_i w_i = 1
    task_arithmetic:  theta_0 + total * sum_i w_i (theta_i - theta_0)

`total` says whose convention a preference is read in. With 1 (default) task_arithmetic and linear
give IBCL's convex sum: {"maths": 1} is the maths expert itself, and an even preference the average.
Task arithmetic's own convention adds up whole task vectors, each times lambda; an even preference
over k experts is that with total = k * lambda (0.3 to 0.5 a task is common, so 2.4 to 4 for 8).

Every model is an ordinary recipe: `recipe(w)` is what `pluribus merge` replays bit for bit.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from math import isfinite
from typing import Any

from pluribus.core.errors import InputError, RecipeError, listing
from pluribus.core.merger import FACTS, facts
from pluribus.core.method import method_of
from pluribus.core.pool import Pool
from pluribus.core.refs import ModelRef, Place
from pluribus.core.registry import MERGERS
from pluribus.core.weights import Weights
from pluribus.engine.driver import merge
from pluribus.train.continual.preference import Preference, shares
from pluribus.train.continual.preference import sweep as preferences


class CheckpointFront:
    """A base and its experts, asked for models by preference.

    `method` is anything with one `weight` an expert: a name, "ties(density=0.2)" or an object.
    Models that came from files keep their paths for `recipe`; `CheckpointFront.open` takes any
    reference that a recipe does. Raises InputError for a method without such a weight, one that
    needs further inputs, a `total` of 0 or less, or one that its normalisation would undo.
    """

    def __init__(
        self, pool: Pool, method: Any = "task_arithmetic", *, total: float = 1.0, seed: int = 0
    ) -> None:
        self.pool, self.total, self.seed = pool, float(total), seed
        self.method = _weighted(method)
        self.name = facts(self.method).name
        if not (isfinite(self.total) and self.total > 0):
            raise InputError(f"total = {total!r}: give the sum of the merge weights, above 0")
        if getattr(self.method, "normalize", False) and self.total != 1:
            raise InputError(
                f"{self.name} divides its weights by their sum, which undoes total = {total:g}; "
                f'leave it at 1, or give method="{self.name}(normalize=False)"'
            )
        self._base = None if pool.base is None else _place(pool.base)
        self._places = {task: _place(expert) for task, expert in pool.experts.items()}

    @classmethod
    def open(
        cls,
        base: Any,
        experts: Mapping[str, Any],
        method: Any = "task_arithmetic",
        *,
        total: float = 1.0,
        seed: int = 0,
    ) -> "CheckpointFront":
        """Open models by their references: paths, hub repositories, `path+lora`, addresses.

        Raises MissingError and the like for a model that is not there, MismatchError for models
        that do not fit together.
        """
        front = cls(Pool(base, experts), method, total=total, seed=seed)
        front._base = None if base is None else _written(base)
        front._places = {task: _written(what) for task, what in experts.items()}
        return front

    @property
    def tasks(self) -> tuple[str, ...]:
        """The experts' names, in their order."""
        return tuple(self.pool.experts)

    def weights(self, preference: Preference, *, normalise: bool = False) -> dict[str, float]:
        """Return the merge weight of every expert: total * w_i.

        Raises InputError for a preference outside the simplex.
        """
        parts = shares(preference, self.tasks, normalise=normalise)
        return {task: self.total * part for task, part in zip(self.tasks, parts, strict=True)}

    def model(
        self,
        preference: Preference,
        out: str | os.PathLike[str] | None = None,
        *,
        normalise: bool = False,
        **options: Any,
    ) -> Weights:
        """Return the model of a preference, in memory or written to `out`.

        `options` go to `pluribus.merge`. Raises InputError for a preference outside the simplex.
        """
        weights = self.weights(preference, normalise=normalise)
        method = replace(self.method, weight=tuple(weights.values()))
        return merge(self.pool, method, out, seed=self.seed, **options)

    def mean(self, preference: Preference, *, normalise: bool = False) -> Weights:
        """Return the model of a preference in memory: there is no spread to sample from."""
        return self.model(preference, normalise=normalise)

    def sweep(
        self, task: str, points: int, rest: Preference | None = None
    ) -> Iterator[tuple[dict[str, float], Weights]]:
        """Give preferences whose share of one task rises from 0 to 1, each with its model.

        One model is in memory at a time if the caller keeps none.
        """
        for preference in preferences(task, points, self.tasks, rest):
            yield preference, self.model(preference)

    def recipe(self, preference: Preference, *, normalise: bool = False) -> dict[str, Any]:
        """Return the recipe of a preference's model, with paths that hold from any folder.

        `pluribus merge` (or `pluribus.recipe.run`) makes of it what `model` returns, bit for bit.
        Raises InputError for a preference outside the simplex and for models that are only in
        memory.
        """
        weights = self.weights(preference, normalise=normalise)
        lacking = [task for task in self.tasks if self._places[task] is None]
        if self.pool.base is not None and self._base is None:
            lacking.insert(0, "the base")
        if lacking:
            raise InputError(
                f"a recipe needs to say where {listing(lacking)} can be read: save them, and use "
                "CheckpointFront.open(base, {task: path})"
            )
        shared, own = self._parameters()
        models = [
            {
                "model": self._places[task],
                "parameters": {"weight": weights[task], **{k: v[i] for k, v in own.items()}},
            }
            for i, task in enumerate(self.tasks)
        ]
        out: dict[str, Any] = {"merge_method": self.name, "models": models}
        if self._base is not None:
            out["base_model"] = self._base
        if shared:
            out["parameters"] = shared
        return {**out, "seed": self.seed}

    def _parameters(self) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        """Return the method's settings that are not default: for all experts, and one for each."""
        shared: dict[str, Any] = {}
        own: dict[str, tuple[Any, ...]] = {}
        for field in fields(self.method):
            value = getattr(self.method, field.name)
            if field.name == "weight" or value == field.default:
                continue
            if isinstance(value, tuple) and len(value) == len(self.tasks):
                own[field.name] = value
            elif isinstance(value, bool | int | float | str):
                shared[field.name] = value
            else:
                raise RecipeError(
                    f"{self.name}: {field.name} = {value!r} cannot stand in a recipe; give one "
                    "value, or one for each expert"
                )
        return shared, own


def _weighted(what: Any) -> Any:
    """Return the merger, which must be one method with a weight an expert."""
    if isinstance(what, str) and what in MERGERS and not _has_weight(MERGERS[what]):
        raise _no_weight(what)  # it may have parameters without defaults, too
    try:
        method = method_of(what)
    except TypeError as error:  # parameters without a default
        raise InputError(f"{what}: {error}; give it, as in 'ties(density=0.2)'") from None
    parts = getattr(method, "parts", None)
    if parts is not None and len(parts) == 1 and hasattr(parts[0], FACTS):
        method = parts[0]  # "ties(density=0.2)" is read as a chain of one
    known = facts(method)
    if known.name not in MERGERS or not _has_weight(method):
        raise _no_weight(str(method) if parts is not None else known.name)
    if known.needs:
        raise InputError(
            f"{known.name} needs {listing(known.needs)} for every expert, which a preference does "
            "not give; choose another method, such as task_arithmetic"
        )
    return method


def _has_weight(method: Any) -> bool:
    """Return whether a merger or its class has a weight an expert."""
    return "weight" in {field.name for field in fields(method)}


def _no_weight(named: str) -> InputError:
    return InputError(
        f"{named} takes no weight an expert, which is what a preference sets; there are "
        f"{listing(_methods(), 20)}"
    )


def _methods() -> list[str]:
    """Return the merge methods that a preference can drive."""
    known = {name: MERGERS[name] for name in MERGERS}
    return [name for name, cls in known.items() if _has_weight(cls) and not facts(cls).needs]


def _place(weights: Weights) -> str | None:
    """Return the path of weights that are read from a folder or from one file, else None."""
    if weights.folder is not None:
        return _written(weights.folder)
    paths = {getattr(weights.source(name), "path", None) for name in weights.spec}
    path = paths.pop() if len(paths) == 1 else None
    return None if path is None else _written(path)


def _written(what: Any) -> Any:
    """Return a reference as a recipe writes it, or None for weights that are only in memory.

    Paths that exist are made absolute.
    """
    if isinstance(what, Weights):
        return _place(what)
    in_memory = isinstance(what, Mapping) and "model" not in what
    if in_memory or hasattr(what, "state_dict"):
        return None
    ref = what if isinstance(what, ModelRef) else ModelRef.of(what)

    def spelled(place: Place | None) -> Place | None:
        path = "" if place is None else os.path.expanduser(place.path)
        if place is None or not os.path.exists(path):
            return place
        return place.model_copy(update={"path": os.path.abspath(path)})

    ref = ref.model_copy(update={"model": spelled(ref.model), "lora": spelled(ref.lora)})
    plain = ref == ModelRef.of(ref.model.path)
    return ref.model.path if plain else ref.model_dump(exclude_none=True)

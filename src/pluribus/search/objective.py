"""What a merge recipe is searched for: its score on a zoo's validation split, or on named tasks.

    objective: {zoo: demo8, seed: 0}               models are the zoo's: `base` and its tasks' names
    objective: {tasks: [sst2, agnews], limit: 200, models in folders, as recipes name them; the
                seed: 0, shots: 0}                 merge is written to a temporary folder and asked

The score is in percent: on a zoo the mean over its tasks of accuracy over the specialist's own, on
named tasks the mean of their metrics. Every task's figure is a metric of the trial. `minimise`
lists what else shall be small: algorithms with several objectives heed it, the front does always.

    experts        models that the merge takes in beside the base
    bytes          of the merged model
    merge_seconds  measured; it differs between runs
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pluribus.core.errors import InputError, NonFiniteError, OutputError, RecipeError, nearest
from pluribus.core.refs import ModelRef
from pluribus.core.weights import Weights
from pluribus.recipe.schema import Recipe

MINIMISE = ("experts", "bytes", "merge_seconds")
KEYS = {
    "zoo": ("zoo", "seed", "minimise", "limit"),
    "tasks": ("tasks", "seed", "limit", "shots", "minimise", "device"),
}


@runtime_checkable
class Objective(Protocol):
    """Scores recipes. Picklable, so that other processes can."""

    @property
    def minimise(self) -> tuple[str, ...]:
        """Figures that shall be small."""
        ...

    @property
    def text(self) -> str:
        """What scores mean; equal texts, comparable scores."""
        ...

    def plan(self, recipe: Recipe) -> None:
        """Raise what merging by the recipe would raise before it reads a weight."""
        ...

    def __call__(self, recipe: Recipe, report: dict[str, Any]) -> dict[str, float]:
        """Merge, score, and note in the report what was measured."""
        ...

    def save_models(self, recipe: Recipe, folder: Path) -> dict[str, str]:
        """Save models that stand nowhere on disk; return where, as seen from the folder beside."""
        ...


def objective_of(given: Any, folder: Path | None = None, where: str = "space") -> Objective:
    """Read an `objective:` section. Raises RecipeError for what is wrong with it."""
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: objective is a mapping such as {{zoo: demo8}}, not {given!r}")
    kinds = [kind for kind in KEYS if kind in given]
    if len(kinds) != 1:
        said = "both are" if kinds else "neither is"
        raise RecipeError(f"{where}: objective needs zoo or tasks; {said} given")
    (kind,) = kinds
    for key in given:
        if key not in KEYS[kind]:
            raise RecipeError(
                f"{where}: unknown key {key!r} of objective; with {kind} there are: "
                f"{', '.join(KEYS[kind])}." + nearest(str(key), KEYS[kind])
            )
    values = dict(given)
    tasks = values.get("tasks")
    if not isinstance(values.get("zoo", ""), str):
        raise RecipeError(f"{where}: objective: zoo is a name such as demo8, not {values['zoo']!r}")
    if not (tasks is None or isinstance(tasks, str) or _is_names(tasks)):
        raise RecipeError(f"{where}: objective: tasks are names such as [sst2], not {tasks!r}")
    values["minimise"] = _minimised(values.get("minimise", ()), where)
    for key, least in (("seed", 0), ("limit", 1), ("shots", 0)):
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise RecipeError(f"{where}: objective: {key} is a whole number, not {value!r}")
        if value is not None and value < least:
            raise RecipeError(f"{where}: objective: {key} is {value}; give {least} or more")
    if kind == "zoo":
        return ZooObjective(**values)
    if "device" in values:
        from pluribus.tasks.device import usable

        values["device"] = usable(values["device"])
    values["tasks"] = (tasks,) if isinstance(tasks, str) else tuple(map(str, tasks or ()))
    return TasksObjective(**values)


def _is_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)


def _minimised(given: Any, where: str) -> tuple[str, ...]:
    if not (given is None or isinstance(given, str | tuple) or _is_names(given)):
        raise RecipeError(
            f"{where}: objective: minimise is one or several of {', '.join(MINIMISE)}, not "
            f"{given!r}"
        )
    names = (given,) if isinstance(given, str) else tuple(map(str, given or ()))
    for name in names:
        if name not in MINIMISE:
            raise RecipeError(
                f"{where}: objective: {name!r} can't be minimised; there are: "
                f"{', '.join(MINIMISE)}." + nearest(name, MINIMISE)
            )
    return names


# -- a zoo -----------------------------------------------------------------------------------------

_zoos: dict[tuple[str, int], Any] = {}  # built once in a process


@dataclass(frozen=True, kw_only=True)
class ZooObjective:
    """Mean normalised accuracy on a zoo's validation split, in percent."""

    zoo: str
    seed: int = 0
    limit: int | None = None  # first images of each task
    minimise: tuple[str, ...] = ()
    split: str = field(default="val", repr=False)

    def __post_init__(self) -> None:
        """Raise InputError for a zoo that is not known."""
        from pluribus.tasks import zoo as zoos

        if self.zoo not in zoos.names():
            known = zoos.names()
            raise InputError(
                f"no zoo is called {self.zoo!r}; there are: {', '.join(known)}."
                + nearest(self.zoo, known)
            )

    @property
    def text(self) -> str:
        """What scores mean."""
        first = "" if self.limit is None else f", first {self.limit}"
        return f"zoo {self.zoo}, seed {self.seed}, {self.split}{first}"

    def built(self) -> Any:
        """Return the zoo. Raises InputError for an unknown one, DataError without its data."""
        from pluribus.tasks import zoo as zoos

        key = (self.zoo, self.seed)
        if key not in _zoos:
            _zoos[key] = zoos.build(self.zoo, self.seed)
        return _zoos[key]

    def open_model(self, ref: ModelRef) -> Weights:
        """Return a model of the zoo. Raises RecipeError with the nearest name."""
        zoo, name = self.built(), str(ref)
        known = ["base", *zoo.experts]
        if name not in known:
            raise RecipeError(
                f"zoo {self.zoo} has no model {name!r}; there are: {', '.join(known)}."
                + nearest(name, known)
            )
        if name not in self._open:
            state = zoo.base if name == "base" else zoo.experts[name]
            self._open[name] = Weights.of(state, label=name)
        return self._open[name]

    @cached_property
    def _open(self) -> dict[str, Weights]:
        return {}

    def plan(self, recipe: Recipe) -> None:
        """Lay the recipe out."""
        _expanded(recipe, self.open_model)

    def state(self, recipe: Recipe) -> dict[str, Any]:
        """Return the merged weights as tensors by name."""
        return self._merged(recipe)[0]

    def _merged(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, float]]:
        from pluribus.engine.driver import Options, execute

        plan = _expanded(recipe, self.open_model)
        began = time.perf_counter()
        weights = execute(plan, None, Options()).weights
        state = {name: weights[name] for name in weights}
        seconds = time.perf_counter() - began
        return state, _figures(recipe, plan, seconds)

    def __call__(self, recipe: Recipe, report: dict[str, Any]) -> dict[str, float]:
        """Merge in memory and score.

        `report["scaled"]` says that the recipes of this search differ in scales alone; the merge is
        then run once, and kept for the next call.
        """
        if report.get("scaled"):
            plan = _expanded(recipe, self.open_model)
            began = time.perf_counter()
            state = self._scales.state(recipe)
            figures = _figures(recipe, plan, time.perf_counter() - began)
        else:
            state, figures = self._merged(recipe)
        return {**self.scored(state), **figures}

    def __getstate__(self) -> dict[str, Any]:
        """Leave merged models behind when going to another process."""
        return {key: value for key, value in vars(self).items() if key not in ("_scales", "_open")}

    @cached_property
    def _scales(self) -> Any:
        from pluribus.search.scales import Scales

        return Scales(self)

    def scored(self, state: Mapping[str, Any]) -> dict[str, float]:
        """Return the score of some weights, and each task's figure.

        Raises NonFiniteError for weights that are not finite: the first class would win each time.
        """
        for name, tensor in state.items():
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(f"the merge made NaN or infinite values in {name!r}")
        by_task = self.built().normalised(state, self.split, self.limit)
        mean = sum(by_task.values()) / len(by_task)
        return {"score": 100 * mean, **{task: 100 * value for task, value in by_task.items()}}

    def save_models(self, recipe: Recipe, folder: Path) -> dict[str, str]:
        """Save the zoo's models that the recipe names; older ones of their names are replaced."""
        out = {}
        try:
            folder.mkdir(exist_ok=True)
            for ref in recipe.references:
                path = folder / f"{ref}.safetensors"
                self.open_model(ref).save(path)
                out[str(ref)] = f"{folder.name}/{path.name}"
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror})") from None
        return out


# -- named tasks -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TasksObjective:
    """Mean score of a merged language model over named tasks, in percent."""

    tasks: tuple[str, ...]
    seed: int = 0
    limit: int | None = 200  # rows of each task
    shots: int = 0
    device: str = "cpu"
    minimise: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise InputError for a task that is not known, or none."""
        from pluribus.tasks import named

        tasks = named.expand(self.tasks)
        if not tasks:
            raise InputError("objective: tasks is empty; name tasks such as sst2")
        for task in tasks:
            if task.prompt is None:
                raise InputError(
                    f"objective: {task.name} is of images, and merges are scored here as language "
                    "models; name tasks such as sst2, or a zoo"
                )

    @property
    def text(self) -> str:
        """What scores mean."""
        rows = "all rows" if self.limit is None else f"{self.limit} rows"
        return f"tasks {', '.join(self.tasks)}: {rows}, seed {self.seed}, {self.shots} shots"

    def plan(self, recipe: Recipe) -> None:
        """Lay the recipe out."""
        from pluribus.recipe.run import plan

        plan(recipe)

    def __call__(self, recipe: Recipe, report: dict[str, Any]) -> dict[str, float]:
        """Merge into a temporary folder, ask the model, and remove it."""
        from pluribus.recipe.run import run
        from pluribus.tasks import named
        from pluribus.tasks.evaluate import evaluate_all
        from pluribus.tasks.language import CausalLM

        planned: list[Any] = []
        with tempfile.TemporaryDirectory(prefix="pluribus-search-") as folder:
            began = time.perf_counter()
            run(recipe, Path(folder) / "merged", on_plan=planned.append)
            seconds = time.perf_counter() - began
            model = CausalLM.open(
                str(Path(folder) / "merged"),
                label="merged",
                shots=self.shots,
                device=self.device,
            )
        reports = evaluate_all([model], named.expand(self.tasks), limit=self.limit, seed=self.seed)
        report["reports"] = [one.to_dict() for one in reports.reports]
        by_task = {one.task: 100 * one.score for one in reports.reports}
        score, error = reports.mean("merged")
        figures = _figures(recipe, planned[-1].plan, seconds)
        more = {} if error is None else {"standard_error": 100 * error}
        return {"score": 100 * score, **by_task, **more, **figures}

    def save_models(self, recipe: Recipe, folder: Path) -> dict[str, str]:
        """Nothing: the models are on disk."""
        return {}


def _expanded(recipe: Recipe, open_model: Callable[[ModelRef], Weights]) -> Any:
    from pluribus.recipe.expand import expand

    return expand(recipe, open_model).plan


def _figures(recipe: Recipe, plan: Any, seconds: float) -> dict[str, float]:
    base = None if recipe.base_model is None else str(recipe.base_model)
    experts = {str(ref) for ref in recipe.references} - {base}
    return {
        "experts": float(len(experts)),
        "bytes": float(plan.bytes_written),
        "merge_seconds": seconds,
    }

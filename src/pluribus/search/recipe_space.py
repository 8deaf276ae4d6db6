"""Spaces of merge recipes: a recipe's YAML with placeholders, and what its points are scored by.

    objective: {zoo: demo8}
    base_model: base
    models: !manyof {k: 3, of: [{model: digits}, {model: inverted}, {model: shuffled}]}
    <<: !oneof
      - {merge_method: task_arithmetic}
      - {merge_method: ties, parameters: {density: !float [0.05, 1.0]}}
    parameters: {lambda: !float [0.1, 1.0]}

See `pluribus.search.tags` for the tags and `pluribus.search.objective` for `objective`. A point is
an ordinary recipe. Every candidate and both ends of every range are laid out before the first
trial, so a recipe that could not run is refused then, and not after an hour.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pluribus.core.errors import MissingError, OutputError, PluribusError, RecipeError, nearest
from pluribus.core.whole import whole_file
from pluribus.recipe.schema import Recipe
from pluribus.recipe.text import dump
from pluribus.search import tags
from pluribus.search._pyglove import pg
from pluribus.search.objective import Objective, ZooObjective, objective_of
from pluribus.search.scales import only_scales
from pluribus.search.space import Space, space
from pluribus.search.study import Study, Trial

VARIANTS = 150  # recipes at most that are laid out before a search
PLACES = ("model", "base_model", "path", "lora", "source", "tokenizer_source")  # name models


@dataclass(frozen=True)
class RecipeSpace:
    """A space of recipes with its objective."""

    space: Space
    objective: Objective
    folder: Path | None = None
    where: str = "space"
    scales: bool = False  # whether nothing but scales of one merge is left open

    def recipe(self, value: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a point's value. Raises RecipeError if it is none."""
        return Recipe.of(tags.settled(value), folder=self.folder, where=self.where)

    def evaluate(self, value: Mapping[str, Any], report: dict[str, Any]) -> dict[str, float]:
        """Merge by a point's recipe and score the result. What `run` is to be given."""
        recipe = self.recipe(value)
        report["recipe"] = recipe.plain()
        if self.scales:
            report["scaled"] = True
        return self.objective(recipe, report)

    def check(self) -> None:
        """Raise RecipeError for a candidate whose recipe can't be laid out, naming it."""
        for number, (what, dna) in enumerate(variants(self.space)):
            if number >= VARIANTS:
                break
            try:
                self.objective.plan(self.recipe(self.space.decode(dna)))
            except PluribusError as error:
                at = f"with {what}" if what else "at the first point of the space"
                hint = (
                    " Settings that belong to one method go together: <<: !oneof [{merge_method: "
                    "..., parameters: {...}}, ...]"
                )
                told = f"{at} the merge can't run: {error}"
                raise RecipeError(told + hint * ("has no parameter" in told)) from None


def load(path: str | Path, *, check: bool = True) -> RecipeSpace:
    """Read a space of recipes from a file.

    Raises MissingError, RecipeError with file and line, and what the objective raises if its zoo,
    tasks or models are not there.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; a space is a YAML file")
    if not path.is_file():
        near = ""
        if path.parent.is_dir():
            near = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
        raise MissingError(f"{path}: no such file.{near}")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file in UTF-8") from None
    return of(
        tags.read(text, str(path)), folder=path.resolve().parent, where=str(path), check=check
    )


def of(
    value: Any, *, folder: Path | None = None, where: str = "space", check: bool = True
) -> RecipeSpace:
    """Make a space of recipes of a mapping with placeholders. Raises as `load` does."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: a space is a recipe: keys with values")
    value = dict(value)
    if "objective" not in value:
        raise RecipeError(
            f"{where}: nothing says how a merge is scored; add objective: {{zoo: demo8}} or "
            "objective: {tasks: [sst2, agnews], limit: 200}"
        )
    objective = objective_of(value.pop("objective"), folder, where)
    made = RecipeSpace(space(value), objective, folder, where)
    if check:
        made.check()
    first = made.recipe(made.space.decode(made.space.spec.first_dna()))
    scales = isinstance(objective, ZooObjective) and only_scales(made.space.decisions, first)
    return replace(made, scales=scales)


def variants(space: Space) -> Iterator[tuple[str, Any]]:
    """Yield points that together hold every candidate and both ends of every range.

    Each comes with what is peculiar to it: "" for the first point, else "path = candidate".
    """
    yield "", space.spec.first_dna()
    for point in space.spec.decision_points:
        if getattr(point, "is_subchoice", False) and point.subchoice_index:
            continue  # the first place of several has seen every candidate
        forced = _above(point)
        if isinstance(point, pg.geno.Float):
            options: list[Any] = [point.min_value, point.max_value]
        else:
            options = list(range(len(point.candidates)))
        for option in options:
            dna = _forced(space, {**forced, str(point.id): option})
            yield f"{point.id} = {_shown(point, option)}", dna


def _above(point: Any) -> dict[str, Any]:
    """Return the choices that make a decision active."""
    forced: dict[str, Any] = {}
    spec = point.parent_spec
    while spec is not None:
        if spec.is_space and spec.index is not None and spec.parent_spec is not None:
            forced[str(spec.parent_spec.id)] = spec.index
        spec = spec.parent_spec
    return forced


def _forced(space: Space, forced: Mapping[str, Any]) -> Any:
    def decide(point: Any) -> Any:
        if isinstance(point, pg.geno.Float):
            return forced.get(str(point.id), point.min_value)
        k, count = point.num_choices, len(point.candidates)
        if k == 1:
            return [forced.get(str(point.id), 0)]
        wanted = [forced.get(f"{point.id}[{i}]") for i in range(k)]
        picked = [one for one in wanted if one is not None]
        rest = [i for i in range(count) if i not in picked] if point.distinct else [0] * k
        picked = (picked + rest)[:k]
        return sorted(picked) if point.sorted else picked

    return pg.DNA.from_fn(space.spec, decide).use_spec(space.spec)


def _shown(point: Any, option: Any) -> str:
    literals = getattr(point, "literal_values", None)
    return str(literals[option]) if literals and isinstance(option, int) else f"{option:g}"


# -- the best one ----------------------------------------------------------------------------------


def check_out(made: RecipeSpace, path: Path, overwrite: bool = False) -> None:
    """Raise OutputError if `save_best` could not write there, or would replace something."""
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path}: name a file in a folder that exists, such as best.yml")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent}: may not be written into; choose another folder")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists; give --overwrite, or another name")
    models = _models(path)
    if not isinstance(made.objective, ZooObjective) or not models.exists():
        return
    if not models.is_dir() or (any(models.iterdir()) and not overwrite):
        raise OutputError(
            f"{models}: is where the recipe's models go, and stands in the way; give --overwrite "
            "to replace the models in it, or another name for the recipe"
        )


def _models(path: Path) -> Path:
    return path.with_name(f"{path.stem}.models")


def save_best(made: RecipeSpace, study: Study, path: Path, trial: Trial | None = None) -> Path:
    """Write the best trial's recipe (or that of another trial) as `pluribus merge` reads it.

    References beside the space's file are rewritten to be found from the new one; a zoo's models
    are saved in NAME.models beside the recipe. Raises OutputError if it can't be written.
    """
    trial = trial or study.best
    recipe = made.recipe(study.value(trial))
    models = _models(path)
    places = made.objective.save_models(recipe, models)
    plain = _moved(recipe.plain(), places or _relative(recipe, path.parent))
    told = ", ".join(f"{name} {value:.6g}" for name, value in trial.scores.items())
    head = (
        f"# pluribus merge {path.name} merged/\n"
        f"# Trial {trial.number} of {len(study.trials)} by {study.algorithm}: {told} "
        f"({made.objective.text})\n"
    )
    with whole_file(path) as part:
        part.write_text(head + dump(plain), "utf-8")
    return path


def _relative(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Map references to files beside the recipe to the same as seen from another folder."""
    if recipe.folder is None:
        return {}
    out = {}
    for place in recipe.places:
        there = recipe.folder / place
        if "://" not in place and not Path(place).is_absolute() and there.exists():
            out[place] = os.path.relpath(there, folder.resolve())
    return out


def _moved(value: Any, places: Mapping[str, str], key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(inner, places, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, places, key) for inner in value]
    return places.get(value, value) if key in PLACES and isinstance(value, str) else value

"""Load recipes, plan them without reading a weight, and run them.

A file of several documents is a list of recipes whose `name` the others may use as a model. They
run in the order of their needs; each named result is kept in its own folder and made again only if
the recipe, the inputs or the parameters changed: a result is known by the digest of its plan.
"""

import dataclasses
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pluribus.core.errors import MissingError, OutputError, RecipeError, listing, nearest
from pluribus.core.merger import stages
from pluribus.core.refs import ModelRef, Place
from pluribus.core.source import Source, TensorSpec
from pluribus.core.weights import Weights
from pluribus.engine import provenance
from pluribus.engine.driver import Options, Result, check_options, execute, target_of
from pluribus.engine.plan import Plan
from pluribus.engine.run import Progress, threads_of
from pluribus.recipe.estimate import Stopwatch
from pluribus.recipe.expand import Expanded, expand
from pluribus.recipe.files import made_files, without_carried
from pluribus.recipe.schema import Recipe
from pluribus.recipe.text import documents

OnProgress = Callable[[Progress], None]


# -- loading ---------------------------------------------------------------------------------------


def load(
    source: str | Path | Mapping[str, Any], *, lenient: bool = False, folder: Path | None = None
) -> list[Recipe]:
    """Read the recipes of a file, of YAML text, or of a mapping; in the order of their needs.

    Text is taken as YAML if it has a line break or a colon and is no file. Raises MissingError for
    a file that is not there, RecipeError with file, line and key for what is wrong in it.
    """
    if isinstance(source, Mapping):
        recipes = [Recipe.of(source, folder=folder, lenient=lenient)]
        return _ordered(recipes)
    text, where = str(source), "recipe"
    path = Path(text).expanduser() if "\n" not in text and len(text) < 4096 else None
    if path is not None and path.exists() and not path.is_dir():  # also a pipe
        try:
            text, where = path.read_text("utf-8"), str(path)
        except UnicodeDecodeError:
            raise RecipeError(f"{path}: not a text file in UTF-8") from None
        folder = folder or path.resolve().parent
    elif path is not None and path.is_dir():
        raise RecipeError(f"{path}: is a folder; a recipe is a YAML file")
    elif path is not None and (isinstance(source, Path) or ": " not in text):
        near = ""
        if path.parent.is_dir():
            near = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
        raise MissingError(f"{path}: no such recipe.{near}")
    found = documents(text, where)
    if not found:
        raise RecipeError(f"{where}: there is no recipe in it")
    recipes = [
        Recipe.of(
            document,
            folder=folder,
            where=where if len(found) == 1 else f"{where} (document {i + 1})",
            lenient=lenient,
        )
        for i, document in enumerate(found)
    ]
    return _ordered(recipes)


def _ordered(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return recipes so that each follows those it uses, the final one last.

    The final recipe is the one without a name; without such a one, the last. Raises RecipeError for
    equal names, several finals, and cycles.
    """
    names = Counter(recipe.name for recipe in recipes)
    twice = [str(name) for name, count in names.items() if name is not None and count > 1]
    if twice:
        raise RecipeError(f"{recipes[0].where}: several recipes are called {listing(twice)}")
    if names[None] > 1:
        raise RecipeError(
            f"{recipes[0].where}: {names[None]} documents have no name; only the final merge may "
            "go without, the others need a name to be kept under"
        )
    final = next((r for r in recipes if r.name is None), recipes[-1])
    by_name = {recipe.name: recipe for recipe in recipes}
    out: list[Recipe] = []
    above: list[Recipe] = []

    def visit(recipe: Recipe) -> None:
        if any(recipe is other for other in out):
            return
        if any(recipe is other for other in above):
            chain = [str(r.name) for r in above] + [str(recipe.name)]
            raise RecipeError(f"{recipe.where}: recipes use each other: {' -> '.join(chain)}")
        above.append(recipe)
        for place in recipe.places:
            if place in by_name:
                visit(by_name[place])
        above.pop()
        out.append(recipe)

    for recipe in [*(r for r in recipes if r is not final), final]:
        visit(recipe)
    return [*(r for r in out if r is not final), final]


# -- planning --------------------------------------------------------------------------------------


class Kept(Source):
    """A tensor of another recipe's result, known by that recipe's plan and not by a file's time.

    Before the result is made it has a type and a shape, and cannot be read.
    """

    def __init__(self, name: str, spec: TensorSpec, digest: str, source: Source | None) -> None:
        self.name, self.spec, self.digest, self.source = name, spec, digest, source

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        if self.source is None:
            raise MissingError(f"{self.name}: its recipe has not been run yet")
        self.source.read(start, stop, out)

    @property
    def fingerprint(self) -> str:
        """The digest of the plan it was made by."""
        return f"{self.digest}:{self.name}"


@dataclass(frozen=True)
class Planned:
    """A recipe with all that is known before a weight is read."""

    recipe: Recipe
    expanded: Expanded
    files: Mapping[str, bytes]
    warnings: tuple[str, ...]
    _folder: Path | None = field(default=None, repr=False)  # its files, for later recipes

    @property
    def plan(self) -> Plan:
        """What the engine runs."""
        return self.expanded.plan

    @property
    def report(self) -> dict[str, Any]:
        """The same as `describe(self)`."""
        return describe(self)

    def result(self, made: Weights | None = None) -> Weights:
        """Return the result as later recipes see it, from a finished output or as a promise."""
        digest = self.plan.digest()
        sources: dict[str, Source] = {
            name: Kept(name, spec, digest, made.source(name) if made is not None else None)
            for name, spec in self.plan.specs.items()
        }
        return Weights(
            sources,
            label=self.recipe.name or "result",
            aliases=self.plan.aliases,
            folder=self._folder,
        )


class _Workshop:
    """Opens the models of recipes: results of other recipes by name, everything else by place."""

    def __init__(self) -> None:
        self.results: dict[str, Weights] = {}
        self._open: dict[ModelRef, Weights] = {}

    def opener(self, recipe: Recipe) -> Callable[[ModelRef], Weights]:
        """Return a function that opens a recipe's references."""

        def open_model(ref: ModelRef) -> Weights:
            made = self.results.get(ref.model.path)
            if made is not None and ref.lora is None:
                return made
            located = located_ref(ref, recipe.folder)
            key = located if made is None else ref
            if key not in self._open:
                if made is None:
                    weights = Weights.open(located, label=str(ref))
                else:
                    from pluribus.core.lowrank import with_adapter

                    folder = Weights._folder_of(located.lora)  # type: ignore[arg-type]
                    weights = with_adapter(made, folder, label=str(ref))
                self._open[key] = weights
            return self._open[key]

        return open_model


def located_ref(ref: ModelRef, folder: Path | None) -> ModelRef:
    """Return a reference whose relative paths that exist beside the recipe are spelled out."""

    def located(place: Place | None) -> Place | None:
        if place is None or folder is None or "://" in place.path:
            return place
        there = folder / Path(place.path).expanduser()
        return place.model_copy(update={"path": str(there)}) if there.exists() else place

    return ref.model_copy(update={"model": located(ref.model), "lora": located(ref.lora)})


def _planned(recipe: Recipe, workshop: _Workshop, allow_crimes: bool) -> Planned:
    expanded = expand(recipe, workshop.opener(recipe), allow_crimes=allow_crimes)
    files, notes = made_files(expanded)
    state = xxhash.xxh3_128()
    for name in sorted(files):
        state.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    plan = dataclasses.replace(
        expanded.plan,
        warnings=tuple(dict.fromkeys((*expanded.plan.warnings, *notes))),
        files=state.hexdigest(),
    )
    folder = _as_folder(files, workshop) if recipe.name is not None else None
    return Planned(
        recipe, dataclasses.replace(expanded, plan=plan), files, tuple(plan.warnings), folder
    )


def _as_folder(files: Mapping[str, bytes], workshop: _Workshop) -> Path:
    """Put a promised result's small files where later recipes can read them."""
    folder = Path(tempfile.mkdtemp(prefix="pluribus-"))
    weakref.finalize(workshop, shutil.rmtree, folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def plan(recipes: Sequence[Recipe] | Recipe, *, allow_crimes: bool = False) -> list[Planned]:
    """Lay out recipes from headers alone, each on the promised results of those before it.

    Raises what `run` would raise before it reads a weight.
    """
    workshop = _Workshop()
    out = []
    for recipe in _ordered([recipes] if isinstance(recipes, Recipe) else recipes):
        planned = _planned(recipe, workshop, allow_crimes)
        if recipe.name is not None:
            workshop.results[recipe.name] = planned.result()
        out.append(planned)
    return out


def describe(planned: Planned) -> dict[str, Any]:
    """Return a plan as plain values: what goes in and out, passes, memory, parameters, warnings."""
    plan, recipe = planned.plan, planned.recipe
    per_pass: dict[int, int] = {}
    for job in plan.jobs:
        for number in range(job.passes):
            per_pass[number] = per_pass.get(number, 0) + job.bytes_read
    tokens = planned.expanded.tokens
    return {
        "name": recipe.name,
        "merge_method": recipe.merge_method,
        "models": list(planned.expanded.models),
        "base_model": None if recipe.base_model is None else str(recipe.base_model),
        "tensors": len(plan.jobs),
        "aliases": dict(plan.aliases),
        "elements": sum(job.spec.size for job in plan.jobs),
        "layers": plan.layers,
        "bytes_read": plan.bytes_read,
        "bytes_read_per_pass": [per_pass[number] for number in sorted(per_pass)],
        "bytes_written": plan.bytes_written,
        "memory_per_thread": max((job.working_bytes for job in plan.jobs), default=0),
        "whole_model_folds": sorted(
            {
                name
                for job in plan.jobs
                if job.merger is not None
                for stage in stages(job.merger)
                for name, fold in stage.items()
                if fold.scope == "model"
            }
        ),
        "seed": plan.seed,
        "digest": plan.digest(),
        "config_changes": dict(plan.config),
        "files": sorted(planned.files),
        "tokenizer": None if tokens is None else tokens.alignment.report.to_dict(),
        "parameters": _parameters(planned.expanded),
        "warnings": list(planned.warnings),
    }


def dry_run(
    recipes: Sequence[Recipe] | Recipe,
    options: Options | None = None,
    *,
    allow_crimes: bool = False,
) -> dict[str, Any]:
    """Plan recipes and return all of it as plain values, in the order they would run.

    Besides headers, it reads a few MB to tell how long a run would take (`seconds`).
    """
    options = options or Options()
    check_options(options)
    watch = Stopwatch(options.device)
    told = []
    for planned in plan(recipes, allow_crimes=allow_crimes):
        entry = describe(planned)
        threads, most = options.threads, entry["memory_per_thread"]
        threads = threads_of(planned.plan, threads, options.memory)
        seconds, rate = watch.estimate(planned.plan, threads, options.memory)
        entry |= {"threads": threads, "memory": max(most, min(threads * most, options.memory))}
        told.append(entry | {"seconds": float(f"{seconds:.3g}"), "bytes_per_second": round(rate)})
    return {"recipes": told, "seconds": float(f"{sum(e['seconds'] for e in told):.3g}")}


def dry_run_text(told: Mapping[str, Any]) -> str:
    """Return what `dry_run` gave as lines for people."""
    return "\n\n".join(_entry_text(entry) for entry in told["recipes"])


def _entry_text(entry: Mapping[str, Any]) -> str:
    head = entry["merge_method"] + (f" -> {entry['name']}" if entry["name"] else "")
    passes = entry["bytes_read_per_pass"]
    lines = [
        head,
        f"  models    {', '.join(entry['models'])}"
        + (f" (base: {entry['base_model']})" if entry["base_model"] else ""),
        f"  tensors   {entry['tensors']} ({entry['elements'] / 1e6:.3g} M values, "
        f"{entry['layers']} layers)",
        f"  read      {_size(entry['bytes_read'])} in {len(passes)} passes: "
        f"{', '.join(map(_size, passes))}",
        f"  write     {_size(entry['bytes_written'])}",
        f"  memory    {_size(entry['memory'])} for blocks, {_threads(entry['threads'])}",
        f"  time      about {_duration(entry['seconds'])} on {_threads(entry['threads'])}, "
        f"reading at {_size(entry['bytes_per_second'])}/s",
        f"  seed      {entry['seed']}",
    ]
    if entry["config_changes"]:
        changes = ", ".join(f"{k} = {v}" for k, v in entry["config_changes"].items())
        lines.append(f"  config    {changes}")
    tokens = entry["tokenizer"]
    if tokens is not None:
        lines.append(f"  tokenizer {tokens['tokens']} tokens in {tokens['rows']} rows")
        for model in tokens["models"]:
            lines.append(
                f"    {model['label']}: {model['own']} rows kept, {model['substituted']} "
                f"substituted, {model['zero']} zero, {model['pad']} padding, {model['dropped']} "
                "tokens dropped"
            )
    lines.append("  parameters")
    for group in entry["parameters"]:
        place = "outside" if group["layer"] is None else f"layer {group['layer']}"
        values = ", ".join(f"{k} = {v}" for k, v in group["parameters"].items()) or "defaults"
        lines.append(f"    {place:<10}{values}  [{listing(group['tensors'], 2)}]")
    lines += [f"  warning: {note}" for note in entry["warnings"]]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _parameters(expanded: Expanded) -> list[dict[str, Any]]:
    """Return the parameters in force: one entry for each layer and distinct set of them."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for job, values in zip(expanded.plan.jobs, expanded.parameters, strict=True):
        if values is None:
            continue
        key = (job.layer, tuple(values.items()))
        entry = groups.setdefault(
            key, {"layer": job.layer, "parameters": _plain(values), "tensors": []}
        )
        entry["tensors"].append(job.name)
    return list(groups.values())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


# -- running ---------------------------------------------------------------------------------------


def run(
    recipes: Sequence[Recipe] | Recipe,
    out: str | Path | None,
    options: Options | None = None,
    on_progress: OnProgress | None = None,
    *,
    stages_dir: str | Path | None = None,
    allow_crimes: bool = False,
    on_plan: Callable[[Planned], None] | None = None,
) -> Result:
    """Run recipes and return the final one's result.

    Named results before the final one go to folders in `stages_dir` (default OUT.stages) and are
    made again only if their plan changed; without `out` everything stays in memory. `on_plan` is
    called with each plan before it runs. Everything is planned before anything is read. Raises
    PluribusError with what was given and what to do; nothing that existed is harmed.
    """
    options = options or Options()
    promised = plan(recipes, allow_crimes=allow_crimes)
    target = None if out is None else target_of(out)
    if target is not None and options.overwrite:
        for promise in promised:
            _refuse_inputs(promise, target)
    if target is not None and options.resume:
        done = provenance.plan_of(target)
        if done is not None and done == promised[-1].plan.digest():
            if on_plan is not None:
                on_plan(promised[-1])
            told = tuple(dict.fromkeys(note for each in promised for note in each.warnings))
            return Result(Weights.open(target), 0.0, 0, 0, True, target, told)
    workshop = _Workshop()
    kept = _stages_folder(target, stages_dir) if len(promised) > 1 else None
    result = None
    notes: dict[str, None] = {}
    for promise in promised:
        recipe, last = promise.recipe, promise is promised[-1]
        planned = _planned(recipe, workshop, allow_crimes) if len(promised) > 1 else promise
        if on_plan is not None:
            on_plan(planned)
        where, how = target, options
        if not last and kept is not None:
            where, how = kept / str(recipe.name), dataclasses.replace(options, overwrite=True)
            kept.mkdir(exist_ok=True)
        single = where is not None and where.name.endswith(".safetensors")
        result = execute(
            without_carried(planned.plan) if where is not None else planned.plan,
            where,
            how,
            on_progress,
            files={} if single or where is None else planned.files,
        )
        notes |= dict.fromkeys((*planned.warnings, *result.warnings))
        if recipe.name is not None:
            workshop.results[recipe.name] = planned.result(result.weights)
    assert result is not None
    return dataclasses.replace(result, warnings=tuple(notes))


def _stages_folder(target: Path | None, given: str | Path | None) -> Path | None:
    if given is not None:
        folder = Path(given).expanduser()
    elif target is not None:
        folder = target.with_name(target.name + ".stages")
    else:
        return None
    if not folder.parent.is_dir():
        raise OutputError(f"{folder.parent}: no such folder to keep intermediate merges in")
    return folder


def _refuse_inputs(planned: Planned, target: Path) -> None:
    """Raise OutputError if the output would replace a model that the recipe reads."""
    for place in planned.recipe.places:
        ref = located_ref(ModelRef(model=Place(path=place)), planned.recipe.folder)
        path, out = Path(ref.model.path).expanduser().resolve(), target.resolve()
        if path.exists() and out.exists() and (path == out or out in path.parents):
            raise OutputError(
                f"{target}: is an input of this recipe and would be replaced; choose another output"
            )

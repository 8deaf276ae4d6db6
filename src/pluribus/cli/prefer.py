"""`pluribus prefer`: a model for a preference between tasks, out of their fine-tunes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import (
    Json,
    Memory,
    Overwrite,
    Quiet,
    Threads,
    gigabytes,
    progress,
    show_json,
    warn,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(prefer)


def prefer(
    out: Annotated[Path, typer.Argument(help="Folder to write; a sweep makes one in it a point.")],
    experts: Annotated[
        list[str], typer.Argument(help="TASK=MODEL:SHARE for every task; the shares sum to 1.")
    ],
    base: Annotated[str, typer.Option(help="The model that the experts were tuned from.")],
    method: Annotated[
        str, typer.Option(help="Merge method with a weight an expert, as in 'ties(density=0.2)'.")
    ] = "task_arithmetic",
    total: Annotated[
        float, typer.Option(help="Sum of the merge weights: 1 keeps between the experts.")
    ] = 1.0,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Divide the shares by their sum.")
    ] = False,
    sweep: Annotated[
        int | None,
        typer.Option(help="Models for this many shares of the first task, from 0 to 1.", min=2),
    ] = None,
    seed: Annotated[int, typer.Option(help="For methods that draw.", min=0)] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the recipes and plans, and write nothing.")
    ] = False,
    memory: Memory = "512MB",
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge fine-tunes of one base by how much each task counts.

    Example: pluribus prefer out/ --base base/ maths=maths/:0.7 code=code/:0.3
    """
    from pluribus import recipe as recipes
    from pluribus.engine.driver import Options, size_of
    from pluribus.train.continual.front import CheckpointFront
    from pluribus.train.continual.preference import read

    models, wanted = read(experts)
    front = CheckpointFront.open(base, models, method, total=total, seed=seed)
    made = {out: front.recipe(wanted, normalise=normalise)}
    if sweep is not None:
        made = _sweep(front, out, wanted, sweep)
    loaded = {where: recipes.load(recipe) for where, recipe in made.items()}
    options = Options(threads=threads, memory=size_of(memory), overwrite=overwrite)
    told = []
    for where, recipe in loaded.items():
        if dry_run:
            plan = recipes.dry_run(recipe, options)
            told.append({**_told(where, made[where]), "plan": plan})
            if not as_json:
                print(f"# {where}\n{recipe[-1].to_yaml()}{recipes.dry_run_text(plan)}\n")
            continue
        if sweep is not None:
            out.mkdir(exist_ok=True)
        with progress(f"merging into {where}", quiet) as bar:
            result = recipes.run(recipe, where, options, on_progress=bar)
        for note in result.warnings:
            warn(note)
        cost = {
            "seconds": round(result.seconds, 3),
            "bytes_written": result.bytes_written,
            "warnings": list(result.warnings),
        }
        told.append({**_told(where, made[where]), **cost})
        if not as_json:
            pairs = zip(front.tasks, told[-1]["weights"], strict=True)
            weights = ", ".join(f"{task} {weight:.3g}" for task, weight in pairs)
            how = "complete already" if not result.bytes_written else f"{result.seconds:.1f} s"
            print(f"{where}: {weights}; {gigabytes(result.weights.nbytes)} in {how}", flush=True)
    if as_json:
        show_json(told)


def _sweep(front: Any, out: Path, wanted: dict[str, float], points: int) -> dict[Path, Any]:
    """Return the recipes of a sweep of the first task by where their models go."""
    from pluribus.core.errors import OutputError
    from pluribus.train.continual.preference import sweep as preferences

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; a sweep writes a folder of models")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder to write {out.name} into; create it")
    first, *others = front.tasks
    rest = {task: wanted[task] for task in others}
    found = preferences(first, points, front.tasks, rest if any(rest.values()) else None)
    digits = max(2, len(str(points)))
    return {out / f"{first}-{p[first]:.{digits}f}": front.recipe(p) for p in found}


def _told(where: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    weights = [entry["parameters"]["weight"] for entry in recipe["models"]]
    return {"out": str(where), "weights": weights, "recipe": recipe}

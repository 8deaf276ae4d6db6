"""`pluribus tune`: learn coefficients and masks from a little data."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, progress, show_json, steps, warn


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tune)


def tune(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with a tune_method.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: model, coefficients, recipe.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn how much of each expert to add, and write the merged model.

    OUT also holds coefficients.safetensors, tuning.json (the history) and recipe.yml: `pluribus
    merge OUT/recipe.yml AGAIN` makes the same bits without any data.

    Example: pluribus tune examples/tune/vision8.yml tuned/ --html tuned.html
    """
    from pluribus.cli._common import check_page
    from pluribus.tune import _output, _recipe, _report

    out = _output.check(out, overwrite)
    check_page(html)
    loaded = _recipe.load(recipe)
    if device is not None:
        loaded = loaded.on(device)
    run = _recipe.prepare(loaded, steps(quiet))
    _output.check_room(out, run.pool)
    tuned = run.method.fit(
        run.pool,
        run.forward,
        run.streams,
        objective=run.objective,
        device=loaded.device,
        on_step=steps(quiet),
    )
    with progress(f"merging into {out}", quiet) as bar:
        tuned.save(out, models=run.models, overwrite=overwrite, on_progress=bar)
    if html is not None:
        _report.save(tuned, html)
    for note in tuned.warnings:
        warn(note)
    told = tuned.report()
    if as_json:
        show_json({"out": str(out), **{k: v for k, v in told.items() if k != "history"}})
        return
    print(_report.text(tuned))
    print(f"{out}: {told['steps']} steps, loss {told['loss'][0]:.4g} -> {told['loss'][-1]:.4g}")
    if not (out / "recipe.yml").is_file():
        warn("the zoo is in memory, so there is no recipe to replay; see pluribus zoo --out")

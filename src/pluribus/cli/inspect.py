"""`pluribus inspect`: how experts relate before they are merged."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import progress, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(inspect)


def inspect(
    models: Annotated[
        list[str], typer.Argument(help="The base, then the experts; experts only with --base.")
    ],
    base: Annotated[str | None, typer.Option(help="The model the experts come from.")] = None,
    density: Annotated[
        float, typer.Option(help="Share of each tensor that counts as an expert's largest.")
    ] = 0.2,
    mask_lambda: Annotated[float, typer.Option(help="Threshold of the TALL masks.")] = 0.4,
    html: Annotated[
        Path | None, typer.Option(help="Write a page, for example report.html.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Budget for blocks in flight.")] = "512MB",
    threads: Annotated[int | None, typer.Option(help="Default: all processors.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Measure norms, angles, sign conflicts and overlap of fine-tuned models, before a merge.

    Example: pluribus inspect base/ code/ prose/ --html report.html
    """
    from pluribus import report
    from pluribus.core.errors import InputError
    from pluribus.core.pool import Pool
    from pluribus.engine.driver import size_of
    from pluribus.inspect import inspect as run

    if base is None:
        base, *models = models
    if not models:
        raise InputError("name the base and at least one expert: pluribus inspect BASE EXPERTS...")
    with progress("inspecting", quiet or as_json) as bar:
        found = run(
            Pool(base, models),
            density=density,
            mask_lambda=mask_lambda,
            threads=threads,
            memory=size_of(memory),
            on_progress=bar,
        )
    if html is not None:
        report.save(html, found.html())
    if as_json:
        show_json(found.to_dict())
    else:
        print(found.table())
        if html is not None:
            print(f"\n{html}: written")

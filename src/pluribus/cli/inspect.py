"""`pluribus inspect`: how experts relate before they are merged."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Memory, Quiet, Threads, check_page, progress, show_json


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
    memory: Memory = "512MB",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
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
    check_page(html)
    with progress("inspecting", quiet) as bar:
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

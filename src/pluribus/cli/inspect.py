"""`pluribus inspect`: how experts relate before they are merged."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import (
    Json,
    Memory,
    Quiet,
    Threads,
    check_page,
    progress,
    show_json,
    steps,
)


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
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Ranks and shared subspaces; takes minutes.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Dimensions of a subspace.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or the share of the squared norm in it.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Tasks to score merges and lines between models on.")
    ] = None,
    zoo: Annotated[
        str | None, typer.Option(help="The models are weights of this zoo; score on its tasks.")
    ] = None,
    tries: Annotated[
        int,
        typer.Option(
            "--try", help="Merge by so many methods, score them, and recommend the best.", min=0
        ),
    ] = 0,
    lines: Annotated[
        bool, typer.Option("--lines/--no-lines", help="Score the lines between models.")
    ] = True,
    points: Annotated[int, typer.Option(help="Models on each line, ends included.", min=3)] = 5,
    limit: Annotated[int | None, typer.Option(help="Rows of each task.", min=1)] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one a line, to compare what blocks compute on.")
    ] = None,
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
    Example: pluribus inspect base/ code/ prose/ --score gsm8k,sst2 --limit 50 --try 4 --no-lines
    """
    from pluribus import report
    from pluribus.core.errors import InputError
    from pluribus.core.pool import Pool
    from pluribus.engine.driver import size_of
    from pluribus.inspect import asked
    from pluribus.inspect import inspect as run

    if base is None:
        base, *models = models
    if not models:
        raise InputError("name the base and at least one expert: pluribus inspect BASE EXPERTS...")
    check_page(html)
    if tries and score is None and zoo is None:
        raise InputError(f"--try {tries} needs a score: --score TASKS, or --zoo NAME")
    pool = Pool(base, models)
    more = _more(pool, score, zoo, limit, texts)
    with progress("inspecting", quiet) as bar:
        found = run(
            pool,
            density=density,
            mask_lambda=mask_lambda,
            rank=16 if spectra and rank is None and energy is None else rank,
            energy=energy,
            threads=threads,
            memory=size_of(memory),
            on_progress=bar,
        )
    found = asked.completed(
        found,
        pool,
        points if lines else 0,
        tries=tries,
        threads=threads,
        **more,
        on_step=steps(quiet),
    )
    if html is not None:
        report.save(html, found.html())
    if as_json:
        show_json(found.to_dict())
    else:
        print(found.table())
        if html is not None:
            print(f"\n{html}: written")


def _more(
    pool: Any, score: str | None, zoo: str | None, limit: int | None, texts: Path | None
) -> dict[str, Any]:
    """Return what is asked for beside the two passes; what cannot be had is told before them."""
    from pluribus.inspect import asked

    tasks = [name.strip() for name in (score or "").split(",") if name.strip()]
    found: dict[str, Any] = {}
    if zoo is not None:
        found["score"] = asked.on_zoo(zoo, tasks, limit)
    elif tasks:
        found["score"] = asked.on_tasks(tasks, limit)
    if texts is not None:
        found |= {"models": asked.language_models(pool), "inputs": asked.batches(texts, pool)}
    return found

"""`pluribus eval`: how good models are at tasks, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pluribus.cli._common import Json, Quiet, check_page, show_json, steps, warn

if TYPE_CHECKING:
    from pluribus.tasks.evaluate import Reports
    from pluribus.tasks.runs import Wanted


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(eval)


def eval(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Model folders, hub names, BASE+ADAPTER, or recipes (*.yml), which are merged "
            "first; NAME=MODEL names one."
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(help="Comma-separated tasks and groups; see `pluribus tasks`."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Rows of each task, chosen by the seed.", min=1)
    ] = None,
    shots: Annotated[int, typer.Option(help="Worked examples before a question.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Chooses rows and worked examples.", min=0)] = 0,
    specialists: Annotated[
        list[str] | None,
        typer.Option(help="TASK=MODEL, or TASK=SCORE; scores are also given over theirs."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    zoo: Annotated[
        str | None, typer.Option(help="The models are weights of this zoo (NAME or NAME:SEED).")
    ] = None,
    harness: Annotated[
        bool, typer.Option("--harness", help="Use lm-evaluation-harness and its tasks.")
    ] = False,
    include: Annotated[
        Path | None, typer.Option(help="Folder of task files for --harness.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Element type of language models.")] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score models on real tasks, each on the same rows.

    Example: pluribus eval base/ code/ merged.yml --tasks sst2,trec,rte --limit 100 --html page.html
    """
    from pluribus import report
    from pluribus.tasks import runs

    check_page(html)
    wanted = runs.Wanted(
        models=tuple(models),
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        limit=limit,
        shots=shots,
        seed=seed,
        specialists=tuple(specialists or ()),
        device=device,
        dtype=dtype,
    )
    reports = _run(wanted, zoo, harness, include, quiet)
    if html is not None:
        report.save(html, reports.html("Models on tasks"))
    if as_json:
        show_json(reports.to_dict())
    else:
        print(reports.table())
        if html is not None:
            print(f"\n{html}: written")
    for note in dict.fromkeys(
        f"{r.system}, {r.task}: {n}" for r in reports.reports if not harness for n in r.notes
    ):
        warn(note)


def _run(
    wanted: "Wanted", zoo: str | None, harness: bool, include: Path | None, quiet: bool
) -> "Reports":
    from pluribus.core.errors import InputError
    from pluribus.tasks import runs

    if zoo is not None and harness:
        raise InputError("--zoo and --harness are two ways to score; give one of them")
    if include is not None and not harness:
        raise InputError("--include names task files of lm-evaluation-harness; add --harness")
    told = steps(quiet)
    if zoo is not None:
        return runs.on_zoo(wanted, zoo, told)
    if harness:
        return runs.on_harness(wanted, include)
    return runs.on_tasks(wanted, told)

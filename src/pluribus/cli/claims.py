"""`pluribus claims`: measure what the methods claim."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Quiet, check_page, show_json, steps
from pluribus.cli._seeds import beside


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(claims)


def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Systems; all by default.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = Path(
        "benchmarks/results/claims"
    ),
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what the same code measured before.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(help="Seeds that are measured side by side, in processes.")
    ] = 1,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write a page with tables and plots here.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure headline claims on real data, on several seeds; exit 1 if one fails.

    What a seed gave is kept in the cache folder: a run that was ended goes on where it stood, as
    long as no file that it loaded has changed.

    Example: pluribus claims ties lines --seeds 0,1,2 --jobs 2
    """
    import tempfile

    from pluribus import claims as registry
    from pluribus.core.errors import InputError, OutputError
    from pluribus.tasks.sets import cache_folder

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {seeds!r}: give whole numbers such as 0,1,2") from None
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds {seeds!r}: give each seed once, none below 0")
    for name in names or []:
        registry.load(name)  # a misspelt name is known before an hour of work
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: give at least 1")
    check_page(page)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{out}: a file is in the way; name a folder for the records") from None
    chosen = names or registry.systems()
    outcomes = []
    with tempfile.TemporaryDirectory() as anew:
        kept = Path(anew) if again else cache_folder() / "claims"
        with beside(chosen, numbers, kept, jobs, steps(quiet)) as there:
            for name in chosen:
                there(name)
                outcome = registry.run(name, numbers, steps(quiet), kept)
                registry.save(outcome, out)
                outcomes.append(outcome)
                if not as_json:
                    print(_text(outcome), flush=True)
    if as_json:
        show_json([outcome.to_dict() for outcome in outcomes])
    if page is not None:
        from pluribus.claims._page import page as drawn
        from pluribus.report import html

        html.save(page, drawn([outcome.to_dict() for outcome in outcomes]))
    if any(outcome.verdict == "fails" for outcome in outcomes):
        raise typer.Exit(1)


def _text(outcome) -> str:
    told = outcome.to_dict()
    lines = [f"{told['claim']}: {told['title']} — {told['verdict']} ({told['seconds']:.0f} s)"]
    for check in told["checks"]:
        mark = "holds" if check["holds"] else "FAILS"
        mark = mark if check["asserted"] else f"{mark} (reported)"
        seeds = ", ".join(f"{value:.2f}" for value in check["per_seed"])
        lines.append(
            f"  {mark:17s} {check['text']}: {check['measured']:.2f} [{seeds}], "
            f"expected {check['expected']}"
        )
    for name, figure in told["figures"].items():
        spread = f" ± {figure['sd']:.2f}" if figure["sd"] is not None else ""
        lines.append(f"    {name:28s} {figure['mean']:8.2f}{spread}")
    return "\n".join(lines)

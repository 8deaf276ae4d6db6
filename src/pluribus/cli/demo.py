"""`pluribus demo`."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Quiet, show_json, steps


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for models, stores and the report.")] = Path(
        "pluribus-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train eight specialists, combine them in many ways, compare: about a minute.

    Example: pluribus demo --out demo-out
    """
    from pluribus import demo as demos
    from pluribus.demo import page

    found = demos.run(out, seed, steps(quiet))
    show_json(found.to_dict()) if as_json else print(page.text(found))

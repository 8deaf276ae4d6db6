"""`pluribus demo`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for models, stores and the report.")] = Path(
        "pluribus-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train eight specialists, combine them in many ways, compare: about a minute.

    Example: pluribus demo --out demo-out
    """
    from pluribus import demo as demos
    from pluribus.demo import page

    steps = _Steps() if sys.stderr.isatty() and not as_json else None
    found = demos.run(out, seed, steps)
    show_json(found.to_dict()) if as_json else print(page.text(found))


class _Steps:
    """One line on stderr that says what is going on."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        width = 24
        filled = width * done // max(total, 1)
        bar = "#" * filled + "." * (width - filled)
        end = "\n" if done >= total else ""
        print(f"\r{stage[:40]:40s} {bar}", end=end, file=sys.stderr, flush=True)

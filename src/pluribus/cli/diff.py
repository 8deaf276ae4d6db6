"""`pluribus diff`: what changed between two checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Memory, Quiet, check_page, progress, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(diff)


def diff(
    before: Annotated[str, typer.Argument(help="The model to compare with, such as the base.")],
    after: Annotated[str, typer.Argument(help="The model that changed, such as a fine-tune.")],
    ranks: Annotated[
        bool, typer.Option(help="Tell low-rank updates from dense ones; costs some seconds.")
    ] = True,
    html: Annotated[
        Path | None, typer.Option(help="Write a page, for example changes.html.")
    ] = None,
    memory: Memory = "512MB",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell what changed between two checkpoints: tensors, layers, kinds, types, tokenizer.

    Example: pluribus diff base/ code/ --html changes.html
    """
    from pluribus import report
    from pluribus.engine.driver import size_of
    from pluribus.inspect import difference

    check_page(html)
    with progress("comparing", quiet) as bar:
        found = difference(before, after, ranks=ranks, memory=size_of(memory), on_progress=bar)
    if html is not None:
        report.save(html, found.html())
    if as_json:
        show_json(found.to_dict())
    else:
        print(found.table())
        if html is not None:
            print(f"\n{html}: written")

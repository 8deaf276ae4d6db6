"""`pluribus ui`: the catalogue in a browser."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(ui)


def ui(
    host: Annotated[str, typer.Option(help="Others than this machine need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8765,
    store: Annotated[
        Path | None,
        typer.Option(help="File of runs and reports; default: ui.sqlite in $PLURIBUS_HOME."),
    ] = None,
    key_env: Annotated[
        list[str] | None,
        typer.Option(help="Environment variable with a key that visitors must give; may repeat."),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on stderr.")] = False,
) -> None:
    """Search the catalogue, compare, run and read reports in a browser, until Ctrl-C.

    Everything stays on this machine; runs see the folder that the command was started in. --json
    prints the address once it listens.

    Example: pluribus ui --port 0 --no-browser
    """
    from pluribus.core.errors import MissingError
    from pluribus.ui.run import serve

    keys = []
    for name in key_env or []:
        if not os.environ.get(name):
            raise MissingError(f"{name} is not set; --key-env names a variable with a key in it")
        keys.append(os.environ[name])

    def ready(url: str) -> None:
        if as_json:
            show_json({"url": url})
            sys.stdout.flush()
        if not quiet:
            print(f"the catalogue is at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)

    serve(host, port, tuple(keys), store, None, browser, ready)

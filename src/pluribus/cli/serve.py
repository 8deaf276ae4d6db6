"""`pluribus serve`: models behind OpenAI's protocol."""

import sys
from typing import Annotated

import typer

from pluribus.cli._common import Json, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    what: Annotated[
        str,
        typer.Argument(
            help="A server's file (*.yml), a stack (*.yml), or any model folder, composite, "
            "BASE+ADAPTER or hub name."
        ),
    ],
    host: Annotated[str, typer.Option(help="Others than this machine need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str, typer.Option(help="Name of a single model; by default its own.")] = "",
    key_env: Annotated[
        list[str] | None,
        typer.Option(help="Environment variable with a key that clients must send; may repeat."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; goes before the file's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Element type; before the file's.")] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on stderr.")] = False,
) -> None:
    """Serve models to OpenAI's clients until Ctrl-C; docs/serve.md has the file's keys.

    Requests to one model share its passes. SIGTERM lets running requests finish first. --json
    prints address and models once it listens.

    Example: pluribus serve out/merged --port 8000
    """
    from pluribus.serve.config import of
    from pluribus.serve.run import serve as run

    server = of(what, device, dtype, name)
    if key_env:
        folder = server._folder
        server = server.model_copy(update={"keys": [*server.keys, *key_env]})
        server._folder = folder

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    def ready(url: str, models: list[str]) -> None:
        if as_json:
            show_json({"url": url, "models": models})
            sys.stdout.flush()

    run(server, host, port, tell, ready)

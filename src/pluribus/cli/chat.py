"""`pluribus chat`: a conversation in the terminal, with models here or on a server."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from pluribus.cli._common import Json, show_json, warn

if TYPE_CHECKING:
    from pluribus.serve.client import Client


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(chat)


def chat(
    what: Annotated[
        str,
        typer.Argument(
            help="A server's address (http...), or what `pluribus serve` takes: it then runs here."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Who answers; by default the first.")] = None,
    system: Annotated[str | None, typer.Option(help="Said first, as the system.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of one answer, at most.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.", min=0, max=2)
    ] = 0.0,
    key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the server's key.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Element type of models here.")] = None,
    as_json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print answers when they are whole.")
    ] = False,
) -> None:
    """Talk to models; /help lists what else can be said, /compare asks them all.

    Lines may also be piped in, one question each. Ctrl-C stops an answer, not the program. --json
    prints the conversation at its end, and nothing before.

    Example: pluribus chat stack.yml
    """
    from rich.console import Console

    from pluribus.serve.chat import Chat

    with _client(what, key_env, device, dtype) as client:
        talk = Chat(
            client,
            Console(file=io.StringIO() if as_json else None),
            warn,
            model=model,
            system=system,
            whole=quiet,
            max_tokens=max_new_tokens,
            temperature=temperature,
        )
        asks = sys.stdin.isatty()
        if asks:
            print(f"{talk.model} answers; /help lists commands", file=sys.stderr)
        talk.run((lambda: input("> ")) if asks else _line)
        if as_json:
            show_json({"model": talk.model, "messages": talk.said})
        if talk.failed and not asks:
            raise typer.Exit(1)


def _line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


@contextmanager
def _client(
    what: str, key_env: str | None, device: str | None, dtype: str | None
) -> "Iterator[Client]":
    """Give a client of a server that there is, or of one that runs here for as long."""
    import secrets

    from pluribus.core.errors import MissingError
    from pluribus.serve.client import Client

    if what.startswith(("http://", "https://")):
        if key_env is not None and not os.environ.get(key_env):
            raise MissingError(f"the environment variable {key_env} is not set; export it first")
        client = Client(what, os.environ[key_env] if key_env else None)
        try:
            yield client
        finally:
            client.close()
        return
    from pluribus.serve.config import of
    from pluribus.serve.run import background, needed
    from pluribus.serve.served import open_all

    needed()
    server = of(what, device, dtype)
    key = secrets.token_urlsafe(24)  # nobody else on this machine is to use it
    with background(open_all(server), server.limits, (key,)) as url:
        client = Client(url, key)
        try:
            yield client
        finally:
            client.close()

"""`pluribus generate`: one model, or several as one, write after a prompt."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, check_page, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A stack (*.yml), a folder of a fused or routed model, or any model folder, "
            "BASE+ADAPTER or hub name."
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="What to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn above temperature 0.", min=0)] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with each token's weights.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; a stack may say.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Element type of a plain model.")] = "float32",
    as_json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print the text when it is whole.")
    ] = False,
) -> None:
    """Write a continuation, piece by piece as it comes.

    With several models (see docs/fused.md) --json and --html also give the weight with which each
    token was chosen.

    Example: pluribus generate stack.yml "Q: How far is the moon?" --max-new-tokens 40 --html m.html
    """
    from pluribus import report
    from pluribus.decode import plot
    from pluribus.decode.stack import open_reference
    from pluribus.decode.write import write

    check_page(html)
    opened = open_reference(model, device, dtype)
    written = write(
        opened,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        on_text=None if as_json or quiet else lambda piece: print(piece, end="", flush=True),
    )
    if html is not None:
        fuser = getattr(opened.model, "fuser", None)
        page = plot.page(
            f"Written by {Path(model).name}", prompt, written.tokens, written.weights, fuser
        )
        report.save(html, page)
    if as_json:
        show_json(written.to_dict())
        return
    print(written.text if quiet else "")

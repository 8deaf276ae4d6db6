"""`pluribus methods`: find the method for a need."""

from typing import Annotated

import typer

from pluribus.cli._common import Json, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(methods)


def methods(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words to look for, or `show NAME`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the merge methods, or those that match some words.

    Example: pluribus methods sign conflict;  pluribus methods show ties
    """
    from pluribus import catalogue
    from pluribus.core.errors import InputError

    words = words or []
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise InputError("name one method: pluribus methods show NAME")
        card = catalogue.card(words[1])
        show_json(card.to_dict()) if as_json else print(card.text())
        return
    cards = catalogue.find(words)
    if as_json:
        show_json([card.to_dict() for card in cards])
    else:
        print(catalogue.table(cards))

"""`pluribus methods`: find the method for a need."""

from typing import Annotated, Literal

import typer

from pluribus.cli._common import Json, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(methods)


def methods(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Words to look for, or `show NAME`, or `compare NAME NAME...`."),
    ] = None,
    needs_no_data: Annotated[
        bool, typer.Option("--needs-no-data", help="Only what needs no data at all.")
    ] = False,
    data: Annotated[
        Literal["none", "unlabelled", "labelled"] | None,
        typer.Option(help="The most data that there is."),
    ] = None,
    trains: Annotated[
        bool | None,
        typer.Option("--trains/--trains-nothing", help="Only what trains something, or nothing."),
    ] = None,
    at: Annotated[
        Literal["merge", "tune", "training", "inference", "measure"] | None,
        typer.Option(help="When it acts."),
    ] = None,
    where: Annotated[
        Literal[
            "weights",
            "gate",
            "logits",
            "cache",
            "program",
            "budget",
            "objective",
            "schedule",
            "pipeline",
            "search",
            "inside",
            "tasks",
        ]
        | None,
        typer.Option(help="Where it recombines what tasks share and what is theirs."),
    ] = None,
    built: Annotated[
        bool | None, typer.Option("--built/--planned", help="Only what runs, or is yet to come.")
    ] = None,
    meaning: Annotated[
        bool,
        typer.Option("--meaning", help="Search by meaning too; needs the packages of `zoo`."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List all systems and methods, or those that match some words and needs, the best first.

    Example: pluribus methods sign conflict --needs-no-data;  pluribus methods compare ties sce
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
    if words[:1] == ["compare"]:
        if len(words) < 3:
            raise InputError("name two methods or more: pluribus methods compare NAME NAME")
        cards = [catalogue.card(name) for name in words[1:]]
        shown = [card.to_dict() for card in cards]
        show_json(shown) if as_json else print(catalogue.beside(cards))
        return
    if needs_no_data and data not in (None, "none"):
        raise InputError(f"--needs-no-data and --data {data} contradict each other; give one")
    filters = catalogue.Filters(
        data="none" if needs_no_data else data, trains=trains, at=at, where=where, built=built
    )
    cards = catalogue.find(words, filters, meaning)
    if as_json:
        show_json([card.to_dict() for card in cards])
    else:
        print(catalogue.table(cards))

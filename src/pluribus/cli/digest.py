"""`pluribus digest`: what is new in a week."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, check_page, show_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(digest)


def digest(
    since: Annotated[
        str | None, typer.Option(help="First day, such as 2026-11-21; default: a week ago.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Last day; default: today.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write: *.md or *.html; default: text on stdout.")
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of records beside the package's own; may repeat."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="File of runs; default: that of `pluribus ui`, if there.")
    ] = None,
    mail: Annotated[
        Path | None, typer.Option(help="YAML file of a mail server: send the digest, too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell which claims have new figures and which runs ended; docs/catalogue.md has the mail file.

    Example: pluribus digest --since 2026-11-21 --out week.html
    """
    import dataclasses
    import datetime

    from pluribus.core.errors import InputError
    from pluribus.core.whole import whole_file
    from pluribus.ui import digest as digests
    from pluribus.ui import mail as letters
    from pluribus.ui.run import default_store

    last = digests.day(until) if until is not None else datetime.date.today()
    first = digests.day(since) if since is not None else last - datetime.timedelta(digests.DAYS)
    if out is not None and out.suffix not in (".md", ".html"):
        raise InputError(f"{out}: a digest is a .md or a .html file")
    check_page(out)
    settings = None if mail is None else letters.load(mail)
    if store is None and default_store().is_file():
        store = default_store()
    found = digests.gather(first, last, records or [], store)
    if out is not None:
        with whole_file(out) as part:
            part.write_text(found.html() if out.suffix == ".html" else found.markdown(), "utf-8")
    if settings is not None:
        letters.send(settings, found.title, found.markdown(), found.html())
    if as_json:
        show_json(dataclasses.asdict(found))
    elif out is None:
        print(found.markdown())
    else:
        print(f"{out}: {found.summary}")

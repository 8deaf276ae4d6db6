"""What several commands share: options, output as JSON, progress on stderr, byte counts."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Memory = Annotated[str, typer.Option(help="Budget for blocks in flight.")]
Threads = Annotated[int | None, typer.Option(help="Default: all processors.", min=1)]


def show_json(value: Any) -> None:
    """Print a value as JSON on stdout; numbers that JSON has no word for are null."""
    print(json.dumps(_plain(value), indent=2, default=str, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)


def check_page(path: Path | None) -> None:
    """Raise OutputError if a page could not be written there: before the work, not after it."""
    from pluribus.core.errors import OutputError

    if path is not None and not path.expanduser().parent.is_dir():
        raise OutputError(f"{path}: no such folder to write a page into; create it")
    if path is not None and path.expanduser().is_dir():
        raise OutputError(f"{path}: is a folder; name a file such as report.html")
    if path is not None and not os.access(path.expanduser().parent, os.W_OK):
        raise OutputError(f"{path.parent}: may not be written into; choose another folder")


def gigabytes(count: float) -> str:
    """Return a byte count for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[Callable[[Any], None] | None]:
    """Show a bar with rate and time left while bytes are read; nothing if stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda now: bar.update(task, completed=now.done, total=max(now.total, now.done))


def steps(quiet: bool = False) -> Callable[[str, int, int], None] | None:
    """Return what shows stages on one line of stderr, or None if stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        return None

    def show(stage: str, done: int, total: int) -> None:
        width = 24
        filled = width * done // max(total, 1)
        bar = "#" * filled + "." * (width - filled)
        end = "\n" if done >= total else ""
        print(f"\r{stage[:40]:40s} {bar}", end=end, file=sys.stderr, flush=True)

    return show

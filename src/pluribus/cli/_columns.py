"""A terminal view of workers that write side by side, on stderr."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

EVERY = 0.1  # seconds between two pictures
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


class Columns(AbstractContextManager["Columns"]):
    """A column a worker, the newest lines of each; nothing where stderr is no terminal."""

    def __init__(self, names: Sequence[str], *, show: bool = True, console: Any = None) -> None:
        from rich.console import Console

        self.names = list(names)
        self.texts = [""] * len(self.names)
        self.tokens = 0
        self.began = time.perf_counter()
        self.console = Console(file=sys.stderr) if console is None else console
        self._live: Any = None
        self._drawn = 0.0
        self._show = show and self.console.is_terminal

    def __enter__(self) -> "Columns":
        """Begin to show."""
        if self._show:
            from rich.live import Live

            self._live = Live(
                self.picture(), console=self.console, auto_refresh=False, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the picture away; the result is printed in its place."""
        if self._live is not None:
            self._live.stop()

    def add(self, worker: int, piece: str) -> None:
        """Take a piece of a worker's text."""
        self.texts[worker] += piece
        self.tokens += 1
        now = time.perf_counter()
        if self._live is not None and now - self._drawn >= EVERY:
            self._drawn = now
            self._live.update(self.picture(), refresh=True)

    def picture(self) -> Any:
        """Return what is shown now."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        width = max(12, self.console.width // max(1, len(self.names)) - 4)
        height = max(4, self.console.height - 5)
        table = Table.grid(expand=True, padding=0)
        for _ in self.names:
            table.add_column(ratio=1)
        panels = []
        for number, (name, text) in enumerate(zip(self.names, self.texts, strict=True)):
            lines = Text(text[-width * height :]).wrap(self.console, width)
            shown = Text("\n").join(list(lines)[-height:])
            colour = COLOURS[number % len(COLOURS)]
            panels.append(Panel(shown, title=Text(name, colour), height=height + 2, style=""))
        table.add_row(*panels)
        seconds = max(1e-9, time.perf_counter() - self.began)
        foot = f" {self.tokens} tokens, {self.tokens / seconds:.1f} a second; Ctrl-C stops"
        return Group(table, Text(foot, style="dim"))

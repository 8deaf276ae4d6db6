"""Runs as child processes: their lines as they come, cancelled or killed, never left behind.

A child has no shell, its own process group, and a terminal for its progress, so that it draws the
bars it would draw for a person; what stands on the last line of that terminal is its progress.
"""

import codecs
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from pluribus.core.errors import OutputError, PluribusError
from pluribus.ui import commands
from pluribus.ui.store import Status, Store

GRACE_SECONDS = 5.0  # from the polite signal to the last one
LARGEST = 16 << 20  # bytes of a report that is kept
KINDS = {".html": "html", ".json": "json", ".md": "text", ".txt": "text"}
# Escape sequences of a terminal, and what else is not text.
CODES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f]"
)


class Child:
    """One process and who listens to it."""

    def __init__(self, process: subprocess.Popen[bytes], form: commands.Form) -> None:
        self.process, self.form = process, form
        self.progress = ""
        self.cancelled = ""  # why, once somebody asked
        self.over = threading.Event()
        self.listeners: list[threading.Thread] = []


class Runner:
    """Starts and ends runs; at most `most` at a time, in `folder`, seen from `cwd`."""

    def __init__(self, store: Store, folder: Path, cwd: Path, most: int = 2) -> None:
        self.store, self.folder, self.cwd, self.most = store, folder, cwd, most
        self._children: dict[int, Child] = {}
        self._lock = threading.Lock()
        self._closed = False

    def start(self, form: commands.Form, values: dict[str, str], title: str = "") -> int:
        """Start a run and return its number.

        Raises InputError for wrong values, OutputError if too many run or it cannot be started.
        """
        with self._lock:
            if self._closed:
                raise OutputError("the server is stopping")
            if len(self._children) >= self.most:
                raise OutputError(
                    f"{self.most} runs go on already; wait for one of them, or cancel it"
                )
            commands.arguments(
                form, values, self.folder
            )  # what is wrong is said before it is noted
            number = self.store.begin(form.name, title or form.title)
            try:
                child = self._spawn(number, form, values)
            except (PluribusError, OSError) as error:
                self.store.end(number, "failed", f"it could not be started: {error}")
                raise
            self._children[number] = child
        threading.Thread(target=self._watch, args=(number, child), daemon=True).start()
        return number

    def _spawn(self, number: int, form: commands.Form, values: dict[str, str]) -> Child:
        place = self.place(number)
        place.mkdir(parents=True, exist_ok=True)
        words = commands.prepared(form, values, place, self.cwd)
        ours, theirs = os.openpty()
        settings = {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        try:
            process = subprocess.Popen(
                commands.program(words),
                cwd=self.cwd,
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=theirs,
                start_new_session=True,
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        child = Child(process, form)
        try:
            self.store.started(number, ["pluribus", *words], process.pid)
        except BaseException:
            process.kill()
            process.wait()
            os.close(ours)
            raise
        assert process.stdout is not None
        out = process.stdout.fileno()
        for stream, source, close in (("out", out, process.stdout.close), ("err", ours, None)):
            thread = threading.Thread(
                target=self._listen, args=(number, child, stream, source, close), daemon=True
            )
            thread.start()
            child.listeners.append(thread)
        return child

    def _listen(
        self, number: int, child: Child, stream: str, source: int, close: Callable[[], None] | None
    ) -> None:
        """Move what a stream says into the log, until its last writer is gone."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest = ""
        try:
            while True:
                try:
                    block = os.read(source, 1 << 16)
                except OSError:  # how a terminal says that nobody is at its other end
                    block = b""
                if not block:
                    break
                rest += decoder.decode(block)
                *whole, rest = rest.replace("\r\n", "\n").split("\n")
                lines = [_last(line) for line in whole]
                if stream == "err":  # bars leave empty ones behind
                    lines = [line for line in lines if line]
                if lines:
                    self.store.write(number, stream, lines)
                if stream == "err":
                    child.progress = _last(rest)
                rest = rest[-(1 << 16) :]
            if _last(rest):
                self.store.write(number, stream, [_last(rest)])
        finally:
            close() if close is not None else os.close(source)

    def _watch(self, number: int, child: Child) -> None:
        code = child.process.wait()
        _signal(child.process.pid, signal.SIGKILL)  # what it started and left behind
        try:
            for thread in child.listeners:
                thread.join()
            try:
                reports, lost = self._collect(number), ""
            except (PluribusError, OSError) as error:
                reports, lost = [], f"; its reports could not be kept: {error}"
            status, note = _outcome(child, code, bool(reports))
            self.store.end(number, status, (note + lost).removeprefix("; "), code)
        finally:
            with self._lock:
                del self._children[number]
            child.over.set()

    def _collect(self, number: int) -> list[str]:
        """Keep the pages and documents that a run wrote."""
        place = self.place(number)
        kept = []
        for path in sorted(place.rglob("*")):
            kind = KINDS.get(path.suffix)
            depth = len(path.relative_to(place).parts)
            if kind is None or depth > 2 or path.is_symlink() or not path.is_file():
                continue
            if path.stat().st_size <= LARGEST:
                name = path.relative_to(place).as_posix()
                self.store.keep(number, name, kind, path.read_bytes())
                kept.append(name)
        return kept

    def place(self, number: int) -> Path:
        """Return the folder of what a run writes."""
        return self.folder / str(number)

    def progress(self, number: int) -> str:
        """Return what a run shows on the last line of its terminal."""
        child = self._children.get(number)
        return "" if child is None else child.progress

    def cancel(self, number: int, why: str = "cancelled from a page") -> None:
        """Ask a run to end, and after a while end it; one that has ended stays as it is."""
        child = self._children.get(number)
        if child is None:
            self.store.run(number)
            return
        child.cancelled = child.cancelled or why
        _signal(child.process.pid, signal.SIGINT)
        threading.Thread(target=self._insist, args=(child,), daemon=True).start()

    def _insist(self, child: Child) -> None:
        if not child.over.wait(GRACE_SECONDS):
            _signal(child.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End all runs and wait until they are gone."""
        with self._lock:
            self._closed = True
            left = dict(self._children)
        for number in left:
            self.cancel(number, "its server was stopped")
        for child in left.values():
            child.over.wait(2 * GRACE_SECONDS)


def _outcome(child: Child, code: int, reported: bool) -> tuple[Status, str]:
    if child.cancelled:
        return "cancelled", child.cancelled
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return "killed", f"the process was ended from outside by {name}"
    if code == 0:
        return "done", ""
    if code == 1 and child.form.verdict and reported:
        return "done", child.form.verdict
    return "failed", f"it ended with exit code {code}"


def _signal(group: int, what: signal.Signals) -> None:
    try:
        os.killpg(group, what)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left in it


def _last(line: str) -> str:
    """Return what a line shows in the end, after all its returns, without a terminal's codes."""
    shown = [part for part in CODES.sub("", line).split("\r") if part.strip()]
    return shown[-1].rstrip() if shown else ""

"""Runs, their logs and their reports in one SQLite file that outlives its server.

    runs    (number, form, title, command, status, note, code, pid, began, ended)
    lines   (run, number, stream, text)           what a run said, in order
    reports (number, run, name, kind, body, made)

One server uses a file at a time; a run that its server left running is marked as lost when the next
one opens it. A file of a newer version is refused and stays as it is.
"""

import fcntl
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pluribus.core.errors import FormatError, MissingError, OutputError

VERSION = 1
OURS = 0x706C7572  # "plur", SQLite's application_id
MOST_LINES = 20_000  # of a run
LONGEST = 4_000  # characters of a line
TABLES = """
CREATE TABLE runs (
    number INTEGER PRIMARY KEY, form TEXT NOT NULL, title TEXT NOT NULL, command TEXT NOT NULL,
    status TEXT NOT NULL, note TEXT NOT NULL, code INTEGER, pid INTEGER,
    began REAL NOT NULL, ended REAL
);
CREATE TABLE lines (
    run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, number INTEGER NOT NULL,
    stream TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY (run, number)
) WITHOUT ROWID;
CREATE TABLE reports (
    number INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE,
    name TEXT NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL, made REAL NOT NULL
);
"""
Status = Literal["running", "done", "failed", "cancelled", "killed", "lost"]


class Run(NamedTuple):
    """A command that was started from a page."""

    number: int
    form: str
    title: str
    command: list[str]
    status: Status
    note: str
    code: int | None
    pid: int | None
    began: float  # seconds since 1970
    ended: float | None


class Line(NamedTuple):
    """One line that a run wrote."""

    number: int
    stream: str  # "out" or "err"
    text: str


class Report(NamedTuple):
    """A file that a run left; its body is read apart."""

    number: int
    run: int
    name: str
    kind: str  # "html", "json" or "text"
    size: int
    made: float


class Store:
    """A file of runs. `Store.open` makes or continues one; `Store.look` only reads."""

    def __init__(self, path: Path, base: sqlite3.Connection, lock: Any) -> None:
        self.path, self._base, self._file = path, base, lock
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open a file for one server, or make it.

        Raises FormatError for a newer store or another file, OutputError if it can't be written or
        another server uses it.
        """
        path = Path(path).expanduser()
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(path.name + ".lock").open("ab")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{path}: another `pluribus ui` uses this store; go on there, or name another "
                    "file with --store"
                ) from None
            except OSError:
                pass  # this filesystem has no locks
            store = cls(path, _connected(path, writes=True), lock)
            with _explained(path):
                store._prepare()
            return store
        except BaseException:
            lock.close()
            raise

    @classmethod
    def look(cls, path: str | Path) -> "Store":
        """Open a file to read only, also beside a server. Raises MissingError or FormatError."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingError(f"{path}: there is no store of runs; `pluribus ui` makes one")
        store = cls(path, _connected(path, writes=False), None)
        with _explained(path):
            store._check()
        return store

    def _check(self) -> bool:
        """Return whether tables are there. Raises FormatError for a file that is not ours."""
        (kind,) = self._base.execute("PRAGMA application_id").fetchone()
        (version,) = self._base.execute("PRAGMA user_version").fetchone()
        (count,) = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if count and kind != OURS:
            raise FormatError(f"{self.path}: an SQLite file of something else; name another file")
        if version > VERSION:
            raise FormatError(
                f"{self.path}: a store of version {version}, from a newer pluribus; this one reads "
                f"version {VERSION}: use the newer one, or name another file with --store"
            )
        return bool(count)

    def _prepare(self) -> None:
        there = self._check()
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = NORMAL")
        self._base.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            if not there:
                for statement in filter(str.strip, TABLES.split(";")):
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA application_id = {OURS}")
                self._base.execute(f"PRAGMA user_version = {VERSION}")
            self._base.execute(
                "UPDATE runs SET status = 'lost', ended = ?, note = 'its server ended before it "
                "did' WHERE status = 'running'",
                (time.time(),),
            )

    # -- runs --------------------------------------------------------------------------------------

    def begin(self, form: str, title: str) -> int:
        """Note that a run is about to start, and return its number."""
        with self._transaction():
            made = self._base.execute(
                "INSERT INTO runs (form, title, command, status, note, began) "
                "VALUES (?, ?, '[]', 'running', '', ?)",
                (form, title, time.time()),
            )
            assert made.lastrowid is not None
            return made.lastrowid

    def started(self, run: int, command: Sequence[str], pid: int) -> None:
        """Note what runs, and as which process."""
        with self._transaction():
            self._base.execute(
                "UPDATE runs SET command = ?, pid = ? WHERE number = ?",
                (json.dumps(list(command)), pid, run),
            )

    def end(self, run: int, status: Status, note: str = "", code: int | None = None) -> None:
        """Note what a run came to."""
        with self._transaction():
            self._base.execute(
                "UPDATE runs SET status = ?, note = ?, code = ?, ended = ? WHERE number = ?",
                (status, note, code, time.time(), run),
            )

    def run(self, number: int) -> Run:
        """Return a run. Raises MissingError."""
        found = self._rows("WHERE number = ?", (number,))
        if not found:
            raise MissingError(f"there is no run {number}; it may have been removed")
        return found[0]

    def runs(self, most: int = 200) -> list[Run]:
        """Return the latest runs, the newest first."""
        return self._rows("ORDER BY number DESC LIMIT ?", (most,))

    def since(self, began: float) -> list[Run]:
        """Return the runs that ended since a time, the oldest first."""
        return self._rows("WHERE ended >= ? ORDER BY number", (began,))

    def _rows(self, rest: str, values: Sequence[Any]) -> list[Run]:
        rows = self._all(
            "SELECT number, form, title, command, status, note, code, pid, began, ended FROM runs "
            + rest,
            values,
        )
        try:
            return [Run._make((*row[:3], json.loads(row[3]), *row[4:])) for row in rows]
        except ValueError:
            raise FormatError(
                f"{self.path}: a command in it cannot be read: the file was damaged; name "
                "another file with --store"
            ) from None

    def remove(self, run: int) -> None:
        """Forget a run that has ended, its log and its reports. Raises OutputError if it runs."""
        if self.run(run).status == "running":
            raise OutputError(f"run {run} is still running; cancel it first")
        with self._transaction():
            self._base.execute("DELETE FROM runs WHERE number = ?", (run,))

    # -- what they say and leave -------------------------------------------------------------------

    def write(self, run: int, stream: str, texts: Sequence[str]) -> None:
        """Add lines to a run's log; past the most it only says so once."""
        with self._transaction():
            (last,) = self._base.execute(
                "SELECT coalesce(max(number), 0) FROM lines WHERE run = ?", (run,)
            ).fetchone()
            room = MOST_LINES - last
            kept = [text[:LONGEST] for text in texts[: max(room, 0)]]
            if len(texts) > len(kept) and room > 0:
                kept[-1] = f"... more than {MOST_LINES} lines; the rest is not kept"
            self._base.executemany(
                "INSERT INTO lines VALUES (?, ?, ?, ?)",
                [(run, last + 1 + i, stream, text) for i, text in enumerate(kept)],
            )

    def lines(self, run: int, after: int = 0) -> list[Line]:
        """Return a run's log after a line."""
        rows = self._all(
            "SELECT number, stream, text FROM lines WHERE run = ? AND number > ? ORDER BY number",
            (run, after),
        )
        return [Line(*row) for row in rows]

    def keep(self, run: int, name: str, kind: str, body: bytes) -> int:
        """Keep a report of a run and return its number."""
        with self._transaction():
            made = self._base.execute(
                "INSERT INTO reports (run, name, kind, body, made) VALUES (?, ?, ?, ?, ?)",
                (run, name, kind, body, time.time()),
            )
            assert made.lastrowid is not None
            return made.lastrowid

    def reports(self, run: int | None = None) -> list[Report]:
        """Return the reports of a run, or of all, the newest first."""
        rest, values = ("", ()) if run is None else ("WHERE run = ?", (run,))
        rows = self._all(
            f"SELECT number, run, name, kind, length(body), made FROM reports {rest} "
            "ORDER BY number DESC",
            values,
        )
        return [Report(*row) for row in rows]

    def report(self, number: int) -> tuple[Report, bytes]:
        """Return a report and its body. Raises MissingError."""
        rows = self._all(
            "SELECT number, run, name, kind, length(body), made, body FROM reports "
            "WHERE number = ?",
            (number,),
        )
        if not rows:
            raise MissingError(f"there is no report {number}; it may have been removed")
        return Report(*rows[0][:6]), rows[0][6]

    # -- the file ----------------------------------------------------------------------------------

    def _all(self, query: str, values: Sequence[Any]) -> list[Any]:
        with self._lock, _explained(self.path):
            return self._base.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _explained(self.path):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._base.close()
            if self._file is not None:
                self._file.close()


def _connected(path: Path, *, writes: bool) -> sqlite3.Connection:
    address = f"{path.resolve().as_uri()}?mode={'rwc' if writes else 'ro'}"
    with _explained(path):
        return sqlite3.connect(
            address, uri=True, timeout=30, isolation_level=None, check_same_thread=False
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system say into errors that a user can act on."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OutputError(f"{path}: the store of runs cannot be used ({error})") from None
    except sqlite3.DatabaseError as error:
        raise FormatError(
            f"{path}: not a store of runs ({error}); name another file with --store"
        ) from None
    except OSError as error:
        if isinstance(error, MissingError | OutputError):
            raise
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None

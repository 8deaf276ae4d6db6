"""Trials in one SQLite file that outlives its process at any moment.

    study (key, value)      what is searched: space, objectives, evaluation
    trials (number, ...)    one row a trial, one transaction when it begins and one when it ends

The journal is written ahead and synchronised, so a trial is there wholly or not at all. A trial
that has begun and not ended was cut off, and is run again. One process writes at a time.
"""

import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pluribus.core.errors import FormatError, InputError, OutputError
from pluribus.search._pyglove import pg
from pluribus.search.space import Space
from pluribus.search.study import Objective, Status, Trial

VERSION = 1
TABLES = """
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE trials (
    number INTEGER PRIMARY KEY, dna TEXT NOT NULL, proposer TEXT NOT NULL,
    settled INTEGER NOT NULL, seed INTEGER NOT NULL, status TEXT NOT NULL,
    scores TEXT NOT NULL, metrics TEXT NOT NULL, report TEXT NOT NULL,
    seconds REAL NOT NULL, error TEXT, began REAL NOT NULL, ended REAL
);
"""


class Row(NamedTuple):
    """A stored trial and the algorithm and seed that proposed it."""

    trial: Trial
    proposer: str


class Store:
    """A file of trials of one search. `Store.open` makes or continues one."""

    def __init__(
        self,
        path: Path,
        base: sqlite3.Connection,
        lock: Any,
        space: Space,
        objectives: Sequence[Objective],
    ) -> None:
        self.path, self._base, self._lock = path, base, lock
        self._space, self._objectives = space, tuple(objectives)

    @classmethod
    def open(
        cls, path: str | Path, space: Space, objectives: Sequence[Objective], evaluation: str = ""
    ) -> "Store":
        """Open the file for a search, or make it.

        Raises InputError if it belongs to another space, other objectives or another evaluation,
        FormatError if it is no store, OutputError if it can't be written or is in use.
        """
        path = Path(path).expanduser()
        if path.is_dir() or not path.parent.is_dir():
            if path.is_dir():
                raise OutputError(f"{path}: is a folder; name a file, such as study.sqlite")
            raise OutputError(f"{path}: its folder does not exist; create it, or name another")
        with _explained(path):
            lock = path.with_name(path.name + ".lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise OutputError(
                    f"{path}: another search is writing it; wait for it, or name another file"
                ) from None
            except OSError:
                pass  # this filesystem has no locks
        base = None
        try:
            with _explained(path):
                base = sqlite3.connect(path, timeout=30, isolation_level=None)
                store = cls(path, base, lock, space, objectives)
                store._prepare(_header(space, objectives, evaluation))
            return store
        except BaseException:
            if base is not None:
                base.close()
            lock.close()
            raise

    def _prepare(self, header: Mapping[str, Any]) -> None:
        tables = {name for (name,) in self._base.execute("SELECT name FROM sqlite_master")}
        if tables and not {"study", "trials"} <= tables:
            raise FormatError(f"{self.path}: an SQLite file of something else; name another file")
        self._base.execute("PRAGMA journal_mode = WAL")  # from here on the file is ours
        self._base.execute("PRAGMA synchronous = FULL")
        if not tables:
            with self._transaction():
                for statement in filter(str.strip, TABLES.split(";")):
                    self._base.execute(statement)
                rows = [(key, json.dumps(value)) for key, value in header.items()]
                self._base.executemany("INSERT INTO study VALUES (?, ?)", rows)
            return
        pairs = self._base.execute("SELECT key, value FROM study").fetchall()
        try:
            found = {key: json.loads(value) for key, value in pairs}
        except (TypeError, ValueError) as error:
            raise _damaged(self.path, "what it says of its search", error) from None
        _compare(self.path, found, header)

    def rows(self) -> list[Row]:
        """Return all trials in their order, those that were cut off as running.

        Raises FormatError for a trial that is missing, or is not what a search of this space wrote.
        """
        with _explained(self.path):
            found = self._base.execute(
                "SELECT number, dna, proposer, settled, seed, status, scores, metrics, report, "
                "seconds, error FROM trials ORDER BY number"
            ).fetchall()
        return [self._row(number, stored) for number, stored in enumerate(found)]

    def _row(self, place: int, stored: Sequence[Any]) -> Row:
        number, dna, proposer, settled, seed, status, scores, metrics, report, seconds, error = (
            stored
        )
        try:
            trial = Trial(
                number=number,
                dna=pg.from_json_str(dna),
                seed=seed,
                status=status,
                scores=json.loads(scores),
                metrics=json.loads(metrics),
                report=json.loads(report),
                seconds=seconds,
                settled=settled,
                error=error,
            )
            if number != place:
                raise ValueError(f"trial {place} is missing")
            if status not in get_args(Status) or not 0 <= settled <= number:
                raise ValueError(f"its status is {status!r} after {settled!r} settled ones")
            given = (trial.scores[o.name] for o in self._objectives if status == "done")
            if not all(isinstance(score, int | float) for score in given):
                raise ValueError(f"its scores are {scores}")
            self._space.fitted(trial.dna.clone(deep=True))
        except (ValueError, TypeError, KeyError, AttributeError) as fault:
            raise _damaged(self.path, f"trial {number}", fault) from None
        return Row(trial, proposer)

    def begin(self, trial: Trial, proposer: str) -> None:
        """Note that a trial has begun."""
        self._put(trial, proposer, ended=False)

    def end(self, trial: Trial, proposer: str) -> None:
        """Note what a trial came to."""
        self._put(trial, proposer, ended=True)

    def _put(self, trial: Trial, proposer: str, ended: bool) -> None:
        now = time.time()
        row = (
            trial.number,
            trial.dna.to_json_str(),  # heeded when the row is made, before it was scored
            proposer,
            trial.settled,
            trial.seed,
            trial.status,
            json.dumps(dict(trial.scores)),
            json.dumps(dict(trial.metrics)),
            json.dumps(dict(trial.report), default=str),
            trial.seconds,
            trial.error,
            now,
            now if ended else None,
        )
        keep = "began = excluded.began" if not ended else "ended = excluded.ended"
        with _explained(self.path), self._transaction():
            self._base.execute(
                f"INSERT INTO trials VALUES ({', '.join('?' * 13)}) ON CONFLICT (number) DO UPDATE "
                "SET status = excluded.status, scores = excluded.scores, metrics = "
                "excluded.metrics, report = excluded.report, seconds = excluded.seconds, "
                f"error = excluded.error, {keep}",
                row,
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()
        self._lock.close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system say into errors that a user can act on."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OutputError(f"{path}: the store of trials cannot be used ({error})") from None
    except sqlite3.DatabaseError as error:
        raise FormatError(
            f"{path}: not a store of trials ({error}); name another file, or remove it"
        ) from None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def _damaged(path: Path, what: str, error: Exception) -> FormatError:
    told = f"no {error}" if isinstance(error, KeyError) else str(error)
    return FormatError(
        f"{path}: {what} cannot be read ({told}): the file was damaged or edited; name another file"
    )


def _header(space: Space, objectives: Sequence[Objective], evaluation: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "digest": space.digest,
        "dna_spec": json.loads(space.spec.to_json_str()),
        "decisions": space.decisions,
        "objectives": {objective.name: objective.direction for objective in objectives},
        "evaluation": evaluation,
    }


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError if a store is of another search, saying what is in it and what is not."""
    if found.get("version") != VERSION:
        raise FormatError(
            f"{path}: a store of version {found.get('version')}, but this reads {VERSION}; go on "
            "with the pluribus that wrote it, or name another file"
        )
    if lacking := [key for key in wanted if not isinstance(found.get(key), type(wanted[key]))]:
        raise _damaged(path, "what it says of its search", ValueError(f"no {lacking[0]}"))
    if found["digest"] != wanted["digest"]:
        raise InputError(
            f"{path} holds trials of another space (digest {found['digest'][:12]}, this one has "
            f"{wanted['digest'][:12]}): {_difference(found['decisions'], wanted['decisions'])}; "
            "name another file, or search the space that it was made for"
        )
    for key, kind in (("objectives", "objectives"), ("evaluation", "evaluation")):
        if found[key] != wanted[key]:
            raise InputError(
                f"{path} holds trials with other {kind}: {found[key]!r}, but now "
                f"{wanted[key]!r}; name another file"
            )


def _difference(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    told = []
    for path in dict.fromkeys([*there, *here]):
        one, other = there.get(path, "nothing"), here.get(path, "nothing")
        if one != other:
            told.append(f"{path} is {one} there and {other} here")
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return "; ".join(told[:3]) + more if told else "the values between the placeholders differ"

"""What is new since a day: claims whose records changed, and runs that ended; as text or a page."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pluribus import report
from pluribus.catalogue.records import Record, read, records
from pluribus.core.errors import InputError
from pluribus.report.terminal import clean
from pluribus.ui.store import Run, Store

DAYS = 7


@dataclass(frozen=True)
class Ended:
    """A run that ended, and the names of what it left."""

    run: Run
    reports: tuple[str, ...]


@dataclass(frozen=True)
class Digest:
    """New results between two days, both included."""

    since: datetime.date
    until: datetime.date
    records: tuple[Record, ...]
    runs: tuple[Ended, ...]

    @property
    def title(self) -> str:
        """Return what a letter or a page is called."""
        return f"pluribus: new results from {self.since} to {self.until}"

    @property
    def summary(self) -> str:
        """Return the counts as one sentence."""
        held = sum(record.verdict == "holds" for record in self.records)
        failed = sum(record.verdict == "fails" for record in self.records)
        return (
            f"{len(self.records)} claims with new figures ({held} hold, {failed} fail), "
            f"{len(self.runs)} runs ended."
        )

    def markdown(self) -> str:
        """Return the digest as Markdown; texts from outside are escaped."""
        lines = [f"# {self.title}", "", self.summary, ""]
        if self.records:
            lines += ["## Claims", "", *_table(CLAIMS, self._claims()), ""]
        if self.runs:
            lines += ["## Runs", "", *_table(RUNS, self._ended()), ""]
        return "\n".join(lines)

    def html(self) -> str:
        """Return the digest as a page that needs nothing else."""
        sections = []
        if self.records:
            sections.append(report.section("Claims", report.table(CLAIMS, self._claims())))
        if self.runs:
            sections.append(report.section("Runs", report.table(RUNS, self._ended())))
        return report.page(self.title, sections, subtitle=self.summary)

    def _claims(self) -> list[list[str]]:
        rows = []
        for one in self.records:
            first = one.headline
            told = ("–", "–", "–") if first is None else (first.text, first.figure, first.expected)
            rows.append([one.added, one.name, one.verdict, one.title, *told])
        return rows

    def _ended(self) -> list[list[str]]:
        rows = []
        for run, reports in ((one.run, one.reports) for one in self.runs):
            assert run.ended is not None
            day = datetime.datetime.fromtimestamp(run.ended).strftime("%Y-%m-%d %H:%M")
            note = f" ({run.note})" if run.note else ""
            rows.append(
                [day, str(run.number), run.title, run.status + note, ", ".join(reports) or "–"]
            )
        return rows


CLAIMS = ("day", "claim", "verdict", "what it says", "first inequality", "measured", "expected")
RUNS = ("ended", "run", "what", "state", "reports")


def gather(
    since: datetime.date,
    until: datetime.date,
    folders: Sequence[Path] = (),
    store: Path | None = None,
) -> Digest:
    """Return what is new: in the package's own records, in folders of records, in a store of runs.

    A record in a folder goes before the package's of the same claim. Raises InputError for days in
    the wrong order or no folder, FormatError for a file that is no record or no store, MissingError
    for no store.
    """
    if until < since:
        raise InputError(f"from {since} to {until}: the first day is after the last")
    for folder in folders:
        if not folder.expanduser().is_dir():
            raise InputError(
                f"{folder}: no such folder of records; `pluribus claims --out` makes one"
            )
    found = dict(records())
    for folder in folders:
        found |= {record.name: record for record in read(folder)}
    new = [one for one in found.values() if str(since) <= one.added <= str(until)]
    new.sort(key=lambda one: (one.added, one.name), reverse=True)
    runs: list[Ended] = []
    if store is not None:
        kept = Store.look(store)
        try:
            began = datetime.datetime.combine(since, datetime.time()).timestamp()
            end = datetime.datetime.combine(until, datetime.time.max).timestamp()
            for run in kept.since(began):
                if run.ended is not None and run.ended <= end:
                    names = tuple(each.name for each in kept.reports(run.number))
                    runs.append(Ended(run, names))
        finally:
            kept.close()
    return Digest(since, until, tuple(new), tuple(runs))


def day(text: str) -> datetime.date:
    """Return a day. Raises InputError saying how one is written."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{text[:40]!r} is no day; write it as 2026-11-28") from None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return lines + ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    escaped = clean(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\`*_[]|#" else char for char in escaped)

"""What claims came to, as the package carries it: `records.json`, made from the stored records.

`python -m pluribus.docs` makes the file and `--check` compares it. `added` is the day on which a
record came to say what it says; a record that is measured anew with the same outcome keeps it.
"""

import datetime
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pluribus.core.errors import FormatError

FILE = "records.json"
KEPT = ("title", "paper", "data", "model", "metric", "seeds", "verdict", "checks", "command")


@dataclass(frozen=True)
class Check:
    """An inequality that was measured."""

    text: str
    asserted: bool
    measured: float
    per_seed: tuple[float, ...]
    expected: str  # ">= 3"
    holds: bool

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, or None for one seed."""
        return statistics.stdev(self.per_seed) if len(self.per_seed) > 1 else None

    @property
    def figure(self) -> str:
        """Mean and spread."""
        spread = "" if self.spread is None else f" ± {_short(self.spread)}"
        return f"{_short(self.measured)}{spread}"


@dataclass(frozen=True)
class Record:
    """A claim, and what measuring it on several seeds gave."""

    name: str
    title: str
    paper: str
    data: str
    model: str
    metric: str
    seeds: tuple[int, ...]
    verdict: str  # "holds", "fails" or "measured"
    checks: tuple[Check, ...]
    command: str
    added: str  # ISO date

    @property
    def headline(self) -> Check | None:
        """The first inequality that the claim asserts, or else the first of all."""
        asserted = [check for check in self.checks if check.asserted]
        return next(iter(asserted or self.checks), None)

    @property
    def held(self) -> tuple[int, int]:
        """How many asserted inequalities hold, and how many there are."""
        asserted = [check.holds for check in self.checks if check.asserted]
        return sum(asserted), len(asserted)

    def line(self) -> str:
        """Return verdict and headline figure as one line."""
        held, all_ = self.held
        told = f"{self.verdict} ({held} of {all_} hold)" if all_ else self.verdict
        first = self.headline
        if first is None:
            return told
        return f"{told}; {first.text}: {first.figure}, expected {first.expected}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def of(name: str, told: Mapping[str, Any], added: str, where: str = FILE) -> Record:
    """Return a stored record. Raises FormatError, naming `where`, for what is none."""
    try:
        checks = [
            Check(
                str(one["text"]),
                bool(one["asserted"]),
                float(one["measured"]),
                tuple(float(value) for value in one["per_seed"]),
                str(one["expected"]),
                bool(one["holds"]),
            )
            for one in told["checks"]
        ]
        words = {key: str(told[key]) for key in ("title", "paper", "data", "model", "metric")}
        return Record(
            name=name,
            seeds=tuple(int(seed) for seed in told["seeds"]),
            verdict=str(told["verdict"]),
            checks=tuple(checks),
            command=str(told["command"]),
            added=added,
            **words,
        )
    except (KeyError, TypeError, ValueError) as error:
        fault = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FormatError(
            f"{where}: the record of {name!r} cannot be read ({fault}); measure it anew with: "
            f"pluribus claims {name}"
        ) from None


@cache
def records() -> dict[str, Record]:
    """Return the records that the package carries, by claim."""
    text = (resources.files("pluribus.catalogue") / FILE).read_text("utf-8")
    return {name: of(name, told, told["added"]) for name, told in json.loads(text).items()}


def read(folder: str | Path) -> list[Record]:
    """Return the records of a folder that `pluribus claims --out` wrote; `added` is a file's day.

    Raises FormatError for a file that is no record.
    """
    found = []
    for path in sorted(Path(folder).expanduser().glob("*.json")):
        try:
            told = json.loads(path.read_text("utf-8"))
            name = str(told["claim"])
        except (ValueError, KeyError, TypeError):
            raise FormatError(f"{path}: not a record of a claim; keep such files apart") from None
        day = datetime.datetime.fromtimestamp(path.stat().st_mtime).date()
        found.append(of(name, told, day.isoformat(), str(path)))
    return found


def collect(folder: Path, carried: str, today: str) -> str:
    """Return the text of `records.json` for the records of a folder.

    `carried` is the file as it was: what did not change keeps its day.
    """
    before = json.loads(carried) if carried.strip() else {}
    made = {}
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text("utf-8"))
        kept = {key: told[key] for key in KEPT}
        old = dict(before.get(told["claim"], {}))
        day = old.pop("added", today)
        made[told["claim"]] = {**kept, "added": day if old == kept else today}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _short(value: float) -> str:
    """Return a figure as people read it; nothing below a hundredth."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    shown = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if shown == "-0" else shown

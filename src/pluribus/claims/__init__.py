"""Each system's headline claim, measured here: `pluribus claims ties lines`.

A claim is one file named after its system. It defines `CLAIM` (what is claimed, on what, and the
inequalities) and `measure(seed, on_step) -> {figure: value}`. Running it on several seeds gives a
record with every figure, mean and spread, and a verdict for each inequality: those marked
`asserted` decide whether the claim holds, the others are reported as measured. Nothing is tuned on
test data.
"""

import importlib
import json
import os
import pkgutil
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pluribus import __version__
from pluribus.core.errors import RecipeError, nearest
from pluribus.core.whole import whole_file

OnStep = Callable[[str, int, int], None]


def systems() -> list[str]:
    """Return the names of all claims: the files of this package, with - for _."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


@dataclass(frozen=True, kw_only=True)
class Check:
    """An inequality between figures: left - right >= margin, on the seeds' mean (or on each)."""

    text: str
    left: str
    right: str | None = None
    margin: float = 0.0
    asserted: bool = True
    each: bool = False  # every seed must hold, not only the mean
    at_most: bool = False  # left - right <= margin instead


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a system claims and how it is measured here."""

    name: str
    title: str
    paper: str
    data: str
    model: str
    metric: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Outcome:
    """A claim on some seeds."""

    claim: Claim
    seeds: tuple[int, ...]
    figures: dict[str, list[float]]
    seconds: float

    def gaps(self, check: Check) -> list[float]:
        """Return left - right for each seed."""
        right = self.figures[check.right] if check.right else [0.0] * len(self.seeds)
        return [a - b for a, b in zip(self.figures[check.left], right, strict=True)]

    def holds(self, check: Check) -> bool:
        """Return whether an inequality holds."""
        gaps = self.gaps(check)
        values = gaps if check.each else [statistics.fmean(gaps)]
        if check.at_most:
            return all(value <= check.margin for value in values)
        return all(value >= check.margin for value in values)

    @property
    def verdict(self) -> str:
        """Whether all asserted inequalities hold; "measured" if none is asserted."""
        asserted = [check for check in self.claim.checks if check.asserted]
        if not asserted:
            return "measured"
        return "holds" if all(self.holds(check) for check in asserted) else "fails"

    def to_dict(self) -> dict[str, Any]:
        """Return everything needed to judge and to repeat the measurement."""
        import numpy
        import torch

        checks = []
        for check in self.claim.checks:
            gaps = self.gaps(check)
            checks.append(
                {
                    "text": check.text,
                    "asserted": check.asserted,
                    "measured": round(statistics.fmean(gaps), 3),
                    "per_seed": [round(gap, 3) for gap in gaps],
                    "expected": f"{'<=' if check.at_most else '>='} {check.margin:g}",
                    "holds": self.holds(check),
                }
            )
        return {
            "claim": self.claim.name,
            "title": self.claim.title,
            "paper": self.claim.paper,
            "data": self.claim.data,
            "model": self.claim.model,
            "metric": self.claim.metric,
            "seeds": list(self.seeds),
            "verdict": self.verdict,
            "checks": checks,
            "figures": {
                name: {
                    "mean": round(statistics.fmean(values), 3),
                    "sd": round(statistics.stdev(values), 3) if len(values) > 1 else None,
                    "per_seed": [round(value, 3) for value in values],
                }
                for name, values in self.figures.items()
            },
            "command": f"pluribus claims {self.claim.name}"
            + ("" if self.seeds == (0, 1, 2) else f" --seeds {','.join(map(str, self.seeds))}"),
            "seconds": round(self.seconds, 1),
            "versions": {
                "pluribus": __version__,
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "python": platform.python_version(),
                "processors": os.cpu_count(),
            },
        }


def load(name: str) -> tuple[Claim, Callable[[int, OnStep | None], Mapping[str, float]]]:
    """Return a claim and its measurement. Raises RecipeError with the nearest name."""
    if name not in systems():
        raise RecipeError(
            f"no claim is called {name!r}; there are: {', '.join(systems())}."
            + nearest(name, systems())
        )
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module.CLAIM, module.measure


def run(
    name: str,
    seeds: Sequence[int] = (0, 1, 2),
    on_step: OnStep | None = None,
    kept: Path | None = None,
) -> Outcome:
    """Measure one claim on every seed.

    With `kept`, a seed's figures are written to that folder as soon as they are there, and read
    from it where the same code measured them before (see `_kept`): a run that was ended goes on,
    and seeds may be measured by several processes.

    Raises DataError if the data is not there; a claim that fails is an Outcome, not an error.
    """
    from pluribus.claims import _kept

    claim, measure = load(name)
    figures: dict[str, list[float]] = {}
    seconds = 0.0
    files = _kept.snapshot() if kept else {}
    for seed in seeds:
        found = _kept.read(kept, name, seed, files) if kept else None
        if found is None:
            began = time.perf_counter()
            measured = {key: float(value) for key, value in measure(seed, on_step).items()}
            found = {"figures": measured, "seconds": time.perf_counter() - began}
            if kept:
                _kept.keep(kept, name, seed, found, files)
        for key, value in found["figures"].items():
            figures.setdefault(key, []).append(value)
        seconds += found["seconds"]
    return Outcome(claim, tuple(seeds), figures, seconds)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    with whole_file(path, parents=True) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")


def save(outcome: Outcome, folder: Path) -> Path:
    """Write the record of a claim and return where it stands."""
    path = folder / f"{outcome.claim.name}.json"
    _write(path, outcome.to_dict())
    return path


def markdown(folder: Path) -> str:
    """Return the table of all stored claims for the README."""
    lines = ["| system | claim | measured (mean of seeds) | verdict |", "| --- | --- | --- | --- |"]
    for name in systems():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        for check in found["checks"]:
            spread = ", ".join(f"{value:.1f}" for value in check["per_seed"])
            state = "holds" if check["holds"] else "**fails**"
            state = state if check["asserted"] else f"{state} (reported)"
            lines.append(
                f"| {name} | {_cell(check['text'])} ({check['expected']}) | "
                f"{check['measured']:+.1f} ({spread}) | {state} |"
            )
    return "\n".join(lines)


def verdicts(folder: Path) -> str:
    """Return one row for each stored claim: what it says, how many inequalities hold."""
    lines = ["| system | claim | inequalities that hold | verdict |", "| --- | --- | --- | --- |"]
    for name in systems():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        asserted = [check["holds"] for check in found["checks"] if check["asserted"]]
        verdict = "holds" if all(asserted) else "**fails**"
        verdict = verdict if asserted else "measured"
        lines.append(
            f"| {name} | {_cell(found['title'])} | {sum(asserted)} of {len(asserted)} | {verdict} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

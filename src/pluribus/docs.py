"""Write the generated parts of README and docs: `python -m pluribus.docs`, or `--check` them.

A generated part stands between `<!-- name -->` and `<!-- /name -->`.
"""

import datetime
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from pluribus import catalogue, claims
from pluribus.claims._page import markdown as record_tables

RESULTS = Path("benchmarks/results")
CARRIED = Path("src/pluribus/catalogue") / catalogue.records.FILE  # what the package shows


def speed() -> str:
    """Return the table of the stored benchmark runs."""
    head = ("size", "method", "pluribus", "mergekit", "ratio", "pluribus peak", "mergekit peak")
    lines = ["| " + " | ".join((*head, "over the floor")) + " |", "| --- " * 8 + "|"]
    for path in sorted(RESULTS.glob("merge_speed_*.json"), key=_size):
        for row in json.loads(path.read_text())["rows"]:
            peer = "mergekit_s" in row
            cells = (
                f"{row['size']:g} B",
                row["method"],
                f"{row['pluribus_s']:.2f} s",
                f"{row['mergekit_s']:.1f} s" if peer else "–",
                f"**{row['ratio']:.0f}×**" if peer else "–",
                f"{row['pluribus_peak_mb']:.0f} MB",
                f"{row['mergekit_peak_mb']:.0f} MB" if peer else "–",
                f"{row['pluribus_s'] / row['floor_s']:.1f}×",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size(path: Path) -> float:
    return json.loads(path.read_text())["rows"][0]["size"]


def pages() -> str:
    """Return one section a method from its own docstring."""
    parts = ["Made from the methods' docstrings; `pluribus methods show NAME` prints the same."]
    for card in catalogue.methods():
        body = card.text().replace("```", "")
        parts.append(f"## {card.facts.name}\n\n```\n{body}\n```")
    return "\n\n".join(parts)


def composites() -> str:
    """Return the tables of the claim on composites."""
    path = RESULTS / "claims" / "composite.json"
    return record_tables(json.loads(path.read_text())) if path.is_file() else "No record is stored."


def ui() -> str:
    """Return the table of the stored run of benchmarks/ui_speed.py."""
    path = RESULTS / "ui_speed.json"
    if not path.is_file():
        return "No run is stored."
    told = json.loads(path.read_text())
    search = told["search"]
    rows = [(f"search by words, {search['cards']} cards", search["words"])]
    if "meaning" in search:
        rows.append(("search by meaning", search["meaning"]))
    rows += [(f"answer of `{path}`", spread) for path, spread in told["answer"].items()]
    rows += [
        (f"first paint of `{path}`", spread)
        for path, spread in told["paint"].items()
        if isinstance(spread, dict)
    ]
    lines = ["| what | median | 95 % | largest | n |", "| --- | --- | --- | --- | --- |"]
    for what, spread in rows:
        times = (f"{spread[key]:.1f} ms" for key in ("median_ms", "p95_ms", "largest_ms"))
        lines.append(f"| {what} | {' | '.join(times)} | {spread['n']} |")
    first = told["paint"].get("first visit of all")
    after = "" if first is None else f"; the first page of a new browser painted after {first} ms"
    return "\n".join([*lines, "", f"Load of the machine when it began: {told['load']}{after}."])


PARTS: dict[str, Callable[[], str]] = {
    "methods": catalogue.markdown,
    "tuners": catalogue.tuners,
    "claims": lambda: claims.markdown(RESULTS / "claims"),
    "verdicts": lambda: claims.verdicts(RESULTS / "claims"),
    "speed": speed,
    "composites": composites,
    "ui": ui,
    "systems": catalogue.system_table,
    "pages": pages,
}


def generated(text: str) -> str:
    """Return a document with its generated parts made anew."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            body = make()
            text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def main() -> int:
    """Write or check README.md and docs/*.md; return 1 if a check finds one out of date."""
    check = "--check" in sys.argv[1:]
    stale = []
    old = CARRIED.read_text("utf-8") if CARRIED.is_file() else ""
    new = catalogue.records.collect(RESULTS / "claims", old, datetime.date.today().isoformat())
    if new != old:
        stale.append(str(CARRIED))
        if not check:
            CARRIED.write_text(new, "utf-8")
    for path in [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
        old = path.read_text()
        new = generated(old)
        if new != old:
            stale.append(str(path))
            if not check:
                path.write_text(new)
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())

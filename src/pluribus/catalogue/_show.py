"""Cards as tables: for a terminal, side by side, and for the documentation."""

from collections.abc import Sequence

from pluribus.catalogue._card import PLACES, Card, experts
from pluribus.catalogue._systems import cards
from pluribus.core.merger import Facts
from pluribus.report.terminal import aligned
from pluribus.tune._tuner import TunerFacts


def table(found: Sequence[Card]) -> str:
    """Return one line a card; planned ones say so."""
    width = max((len(one.name) for one in found), default=0)
    lines = [
        f"{one.name:{width}s}  {one.summary}{'' if one.built else ' (planned)'}" for one in found
    ]
    return "\n".join(lines) or "no method has any of these words"


def compared(found: Sequence[Card]) -> tuple[list[str], list[list[str]]]:
    """Return a table of cards side by side: its header, and a row for each label."""
    told = [dict(card.rows()) for card in found]
    labels = list(dict.fromkeys(label for one in told for label in one if label != "name"))
    rows = [[label, *(one.get(label, "") for one in told)] for label in ["title", *labels]]
    rows[0] = ["title", *(card.title for card in found)]
    shared = dict.fromkeys(name for card in found for name in card.parameters)
    for name in shared:
        rows.append([name, *(card.parameters.get(name, "") for card in found)])
    return ["", *(card.name for card in found)], rows


def beside(found: Sequence[Card], width: int = 40) -> str:
    """Return cards side by side for a terminal, texts broken at `width` characters."""
    import textwrap

    header, rows = compared(found)
    lines = []
    for label, *cells in rows:
        broken = [textwrap.wrap(cell, width) or [""] for cell in cells]
        for i in range(max(map(len, broken))):
            parts = [cell[i] if i < len(cell) else "" for cell in broken]
            lines.append([label if i == 0 else "", *parts])
    return aligned(header, lines)


def markdown() -> str:
    """Return the table of merge methods for the documentation."""
    lines = [
        "| method | what it does | base | experts | paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in cards():
        known = one.facts
        if isinstance(known, Facts):
            about = f"{known.base} | {experts(known)} | {_linked(one)}"
            lines.append(f"| `{known.name}` | {known.summary} | {about} |")
    return "\n".join(lines)


def tuners() -> str:
    """Return the table of tuning methods for the documentation."""
    lines = ["| method | what it does | paper |", "| --- | --- | --- |"]
    for one in cards():
        if isinstance(one.facts, TunerFacts):
            lines.append(f"| `{one.facts.name}` | {one.facts.summary} | {_linked(one)} |")
    return "\n".join(lines)


def system_table() -> str:
    """Return the table of all published systems for the documentation."""
    lines = [
        "| system | what it buys | data | trains | recombines | claim, as measured | paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in cards():
        if not one.system:
            continue
        where = ", ".join(PLACES[place] for place in one.where)
        claim = "no record yet" if one.built else "planned"
        if one.record is not None:
            claim = one.record.line().replace("|", "\\|")
        cells = (f"`{one.name}`", one.summary, one.data, one.trains, where, claim, _linked(one))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _linked(card: Card) -> str:
    return f"[{card.paper}]({card.link})" if card.link else card.paper

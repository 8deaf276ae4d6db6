"""Every method as a card: what it is, what it needs, its parameters; made from the code itself."""

import dataclasses
import inspect
import typing
from collections.abc import Sequence
from typing import Any

from pluribus.core.merger import Facts, facts
from pluribus.core.registry import MERGERS


@dataclasses.dataclass(frozen=True)
class Card:
    """One method for people and programs."""

    facts: Facts
    parameters: dict[str, str]  # name -> type and default
    doc: str

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain values."""
        return {**dataclasses.asdict(self.facts), "parameters": self.parameters, "doc": self.doc}

    def text(self) -> str:
        """Return the card for a terminal."""
        lines = [self.doc.strip(), "", f"name        {self.facts.name}"]
        lines.append(f"paper       {self.facts.paper or 'none'}")
        lines.append(f"base        {self.facts.base}")
        low, high = self.facts.experts
        lines.append(
            f"experts     {low}{'+' if high is None else '' if high == low else f'-{high}'}"
        )
        if self.facts.needs:
            lines.append(f"needs       {', '.join(self.facts.needs)}")
        if self.facts.random:
            lines.append("random      yes: depends on the recipe's seed")
        lines.append("parameters" if self.parameters else "parameters  none")
        lines += [f"  {name:14s}{told}" for name, told in self.parameters.items()]
        return "\n".join(lines)


def card(name: str) -> Card:
    """Return the card of one method. Raises RecipeError with the nearest name."""
    cls = MERGERS[name]
    hints = typing.get_type_hints(cls)
    told = {}
    for item in dataclasses.fields(cls):
        kind = _kind(hints[item.name])
        default = "required" if item.default is dataclasses.MISSING else f"= {item.default!r}"
        told["lambda" if item.name == "scale" and name != "passthrough" else item.name] = (
            f"{kind} {default}"
        )
    module = inspect.getmodule(cls)
    doc = (module.__doc__ if module else "") or cls.__doc__ or ""
    return Card(facts(cls), told, inspect.cleandoc(doc))


def _kind(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return text.replace("typing.", "").replace("tuple[float, ...]", "one per expert")


def cards() -> list[Card]:
    """Return all cards by name."""
    return [card(name) for name in MERGERS]


def find(words: Sequence[str]) -> list[Card]:
    """Return the cards that hold all words, or else the most of them.

    Those with the words in their name or summary come first.
    """
    wanted = [word.lower() for word in words]
    scored = []
    for one in cards():
        head = f"{one.facts.name} {one.facts.summary}".lower()
        body = f"{head} {one.doc} {' '.join(one.parameters)}".lower()
        counts = [sum(word in text for word in wanted) for text in (body, head)]
        scored.append((*counts, one))
    most = max((inside for inside, _, _ in scored), default=0)
    kept = [entry for entry in scored if entry[0] == most and (most or not wanted)]
    return [one for _, _, one in sorted(kept, key=lambda e: (-e[1], e[2].facts.name))]


def table(found: Sequence[Card]) -> str:
    """Return one line a method."""
    width = max((len(one.facts.name) for one in found), default=0)
    lines = [f"{one.facts.name:{width}s}  {one.facts.summary}" for one in found]
    return "\n".join(lines) or "no method has any of these words"


def markdown() -> str:
    """Return the table of methods for the documentation."""
    lines = [
        "| method | what it does | base | experts | paper |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in cards():
        known = one.facts
        low, high = known.experts
        many = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        paper = known.paper
        if paper.startswith("arXiv:"):
            paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
        lines.append(f"| `{known.name}` | {known.summary} | {known.base} | {many} | {paper} |")
    return "\n".join(lines)

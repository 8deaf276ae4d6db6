"""Every method as a card: what it is, what it needs, its parameters; made from the code itself."""

import dataclasses
import inspect
import typing
from collections.abc import Sequence
from typing import Any

from pluribus.core.errors import RecipeError, nearest
from pluribus.core.merger import Facts, facts
from pluribus.core.registry import MERGERS
from pluribus.tune import TUNERS
from pluribus.tune._tuner import TunerFacts, tuner_facts


@dataclasses.dataclass(frozen=True)
class Card:
    """One method for people and programs."""

    facts: Facts | TunerFacts
    parameters: dict[str, str]  # name -> type and default
    doc: str

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain values."""
        return {**dataclasses.asdict(self.facts), "parameters": self.parameters, "doc": self.doc}

    def text(self) -> str:
        """Return the card for a terminal."""
        lines = [self.doc.strip(), "", f"name        {self.facts.name}"]
        lines.append(f"paper       {self.facts.paper or 'none'}")
        if isinstance(self.facts, Facts):
            lines.append(f"base        {self.facts.base}")
            lines.append(f"experts     {_many(self.facts)}")
            if self.facts.needs:
                lines.append(f"needs       {', '.join(self.facts.needs)}")
            if self.facts.random:
                lines.append("random      yes: depends on the recipe's seed")
        else:
            lines.append("runs by     pluribus tune, with a little data")
        lines.append("parameters" if self.parameters else "parameters  none")
        wide = max(14, *(len(name) + 2 for name in self.parameters), 0)
        lines += [f"  {name:{wide}s}{told}" for name, told in self.parameters.items()]
        return "\n".join(lines)


def card(name: str) -> Card:
    """Return the card of one method. Raises RecipeError with the nearest name."""
    known = [*MERGERS, *TUNERS]
    if name not in known:
        raise RecipeError(
            f"no method is called {name!r}; there are: {', '.join(known)}.{nearest(name, known)}"
        )
    cls = TUNERS[name] if name in TUNERS else MERGERS[name]
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
    about = tuner_facts(cls) if name in TUNERS else facts(cls)
    return Card(about, told, inspect.cleandoc(doc))


def _many(known: Facts) -> str:
    low, high = known.experts
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"


def _kind(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return text.replace("typing.", "").replace("tuple[float, ...]", "one per expert")


def cards() -> list[Card]:
    """Return all cards by name."""
    return [card(name) for name in [*MERGERS, *TUNERS]]


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
        if isinstance(known, Facts):
            about = f"{known.base} | {_many(known)} | {_linked(known.paper)}"
            lines.append(f"| `{known.name}` | {known.summary} | {about} |")
    return "\n".join(lines)


def tuners() -> str:
    """Return the table of tuning methods for the documentation."""
    lines = ["| method | what it does | paper |", "| --- | --- | --- |"]
    for one in cards():
        known = one.facts
        if isinstance(known, TunerFacts):
            lines.append(f"| `{known.name}` | {known.summary} | {_linked(known.paper)} |")
    return "\n".join(lines)


def _linked(paper: str) -> str:
    if not paper.startswith("arXiv:"):
        return paper
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"

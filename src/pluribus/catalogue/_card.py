"""What a card says: the same few facts of every system, built or planned."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pluribus.catalogue.records import Record

Data = Literal["none", "unlabelled", "labelled"]
At = Literal["merge", "tune", "training", "inference", "measure"]
Where = Literal[
    "weights",
    "gate",
    "logits",
    "cache",
    "program",
    "budget",
    "objective",
    "schedule",
    "pipeline",
    "search",
    "inside",
    "tasks",
]
DATA: tuple[Data, ...] = get_args(Data)
AT: tuple[At, ...] = get_args(At)
WHERE: tuple[Where, ...] = get_args(Where)
PLACES: Mapping[str, str] = {
    "weights": "in the weights",
    "gate": "behind a gate",
    "logits": "in the logits",
    "cache": "in the attention cache",
    "program": "in a program of prompts and tools",
    "budget": "under a compute budget",
    "objective": "in the training objective",
    "schedule": "in the training schedule",
    "pipeline": "in a pipeline of stages",
    "search": "in a search over recipes",
    "inside": "nowhere: it looks inside",
    "tasks": "nowhere: it measures",
}
STAGES: Mapping[str, str] = {
    "merge": "once, when models are put together",
    "tune": "once, with a little data",
    "training": "in training",
    "inference": "at inference",
    "measure": "when something is measured",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One system or method for people and programs.

    `facts` is what its decorator says, where it has one; `parameters` are its fields, name to type
    and default; `record` is its stored claim.
    """

    name: str
    title: str
    summary: str
    needs: str
    data: Data
    trains: str  # "nothing", or what
    at: tuple[At, ...]
    where: tuple[Where, ...]
    memory: str
    inference: str
    package: str
    paper: str = ""
    command: str = ""
    built: bool = True
    system: bool = False  # one of the published systems with a page, not only a method of a family
    facts: Any = None
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    doc: str = ""
    record: Record | None = None

    @property
    def state(self) -> Literal["built", "planned"]:
        """Whether it can be run."""
        return "built" if self.built else "planned"

    @property
    def learns(self) -> bool:
        """Whether anything is trained."""
        return self.trains != "nothing"

    @property
    def link(self) -> str:
        """Return the address of the paper, or an empty text."""
        if not self.paper.startswith("arXiv:"):
            return ""
        return f"https://arxiv.org/abs/{self.paper.removeprefix('arXiv:')}"

    def rows(self) -> list[tuple[str, str]]:
        """Return what is said of it, label and text, for every place that shows a card."""
        told = [
            ("name", self.name),
            ("paper", self.paper or "none"),
            ("state", self.state if self.built else "planned: not built yet"),
        ]
        if (many := experts(self.facts)) is not None:
            told += [("base", self.facts.base), ("experts", many)]
        told += [
            ("needs", self.needs),
            ("data", self.data),
            ("trains", self.trains),
            ("acts", ", ".join(STAGES[at] for at in self.at)),
            ("recombines", ", ".join(PLACES[where] for where in self.where)),
            ("memory", self.memory),
            ("inference", self.inference),
        ]
        if getattr(self.facts, "random", False):
            told.append(("random", "yes: depends on the recipe's seed"))
        if self.record is not None:
            told.append(("claim", self.record.line()))
        if self.command:
            told.append(("run", self.command))
        return told

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain values, the facts of a method beside its needs."""
        known = dataclasses.asdict(self.facts) if self.facts is not None else {}
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("facts", "record", "needs")
        }
        needs = {"needs": known.get("needs", ()), "needs_text": self.needs}
        record = None if self.record is None else self.record.to_dict()
        return {**known, **own, **needs, "parameters": dict(self.parameters), "claim": record}

    def text(self) -> str:
        """Return the card for a terminal."""
        head = self.title if self.title == self.summary else f"{self.title}\n\n{self.summary}"
        lines = [(self.doc or head).strip(), ""]
        lines += [f"{label:11s} {told}" for label, told in self.rows()]
        if self.built and self.facts is not None:
            lines.append("parameters" if self.parameters else "parameters  none")
            wide = max(14, *(len(name) + 2 for name in self.parameters), 0)
            lines += [f"  {name:{wide}s}{told}" for name, told in self.parameters.items()]
        return "\n".join(lines)


def experts(facts: Any) -> str | None:
    """Return how many experts a merge method takes, or None for anything else."""
    bounds = getattr(facts, "experts", None)
    if bounds is None:
        return None
    low, high = bounds
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"

"""Which mode to use, for tasks that were measured, and for others.

    1. a task by its name: what was chosen when it was measured
    2. a question: the measured task whose questions are nearest, within the cut-off (1 - cosine)
    3. traits: the card, if there is one
    4. else the default, which is cheap

A task's place is the mean of its questions' embeddings. Any function of a text that gives a vector
will do; `letters` needs no model.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pluribus import report
from pluribus.agents.thinking.card import Card
from pluribus.agents.thinking.effect import UNDECIDED, Effect
from pluribus.agents.thinking.modes import Attempt, Mode
from pluribus.core.errors import FormatError, InputError, MissingError, OutputError
from pluribus.core.whole import whole_file
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import Generator, Problem

Embed = Callable[[str], Sequence[float]]
FORMAT = "pluribus thinking policy 1"
FORMS = {
    "delta": "+.1%",
    "low": "+.1%",
    "high": "+.1%",
    "p": ".3g",
    "net": "+.4f",
    "extra tokens": "+.1f",
    "unread": "",  # of the default / of the mode
    "delta read": "+.1%",
}
WIDTH = 512


def letters(text: str) -> list[float]:
    """Return counts of three letters in a row, in 512 places by their checksum, of length 1."""
    counts = [0.0] * WIDTH
    said = f" {' '.join(text.lower().split())} "
    for i in range(len(said) - 2):
        counts[zlib.crc32(said[i : i + 3].encode()) % WIDTH] += 1.0
    return _unit(counts)


class Choice(NamedTuple):
    """A mode and why: "measured", "undecided", "near TASK (0.12)", "card (0.81)" or "default"."""

    mode: str
    why: str


@dataclass(frozen=True)
class CoTPolicy:
    """Made by `fit` or `load`."""

    effects: Mapping[str, Effect]
    default: str
    cutoff: float = 0.35
    card: Card | None = None
    thinking: str = ""  # the mode that the card speaks of
    embed: Embed = field(default=letters, repr=False)
    places: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(
        cls, effects: Sequence[Effect], *, embed: Embed = letters, cutoff: float = 0.35
    ) -> "CoTPolicy":
        """Make a policy of measured tasks.

        The card is fitted if all have traits, and enough of them gain and don't. Raises InputError
        for no effect, two of one task, modes that differ, or a cut-off outside [0, 2].
        """
        if not effects:
            raise InputError("no task was measured; give at least one effect")
        if not 0 <= cutoff <= 2:
            raise InputError(f"the cut-off is {cutoff}; give a distance of 0 to 2 (1 - cosine)")
        by = {one.task: one for one in effects}
        if len(by) < len(effects):
            raise InputError("a task was measured twice; give one effect for each")
        modes = {tuple(arm.mode for arm in one.arms) for one in effects}
        if len(modes) > 1:
            raise InputError(
                "the tasks were measured with different modes: "
                + "; ".join(", ".join(names) for names in sorted(modes))
            )
        [names] = modes
        places = {
            name: tuple(_place([embed(question) for question in one.questions]))
            for name, one in by.items()
            if one.questions
        }
        card, pays = None, [one.pairs[0].net > 0 for one in effects]
        if all(one.traits for one in effects) and len(effects) >= 4 and len(set(pays)) == 2:
            card = Card.fit([one.traits for one in effects], pays)
        return cls(by, names[0], cutoff, card, names[1], embed, places)

    def choose(self, task: str | Problem, traits: Mapping[str, bool] | None = None) -> Choice:
        """Return the mode for a task by name, or for a question or problem."""
        asked = task if isinstance(task, str) else task.question
        if (known := self.effects.get(asked)) is not None:
            undecided = known.decision == UNDECIDED
            return Choice(known.chosen, UNDECIDED if undecided else "measured")
        if self.places and asked.strip():
            own = _unit(self.embed(asked))
            far = {name: 1 - _dot(own, place) for name, place in self.places.items()}
            nearest = min(far, key=lambda name: far[name])
            if far[nearest] <= self.cutoff:
                return Choice(self.effects[nearest].chosen, f"near {nearest} ({far[nearest]:.2f})")
        if traits and self.card is not None:
            chance = self.card.chance(traits)
            return Choice(self.thinking if chance > 0.5 else self.default, f"card ({chance:.2f})")
        return Choice(self.default, "default")

    def as_router(self, modes: Sequence[Mode], task: str | None = None) -> "Routed":
        """Return a mode that runs the chosen one of these for each problem, or for a named task.

        Raises InputError if a mode that may be chosen is not among them.
        """
        by = {mode.name: mode for mode in modes}
        may = {self.default, *(one.chosen for one in self.effects.values())}
        if missing := sorted((may | ({self.thinking} if self.card else set())) - set(by)):
            raise InputError(f"the policy may choose {', '.join(missing)}; give that mode too")
        return Routed(self, by, task)

    def rows(self) -> tuple[list[str], list[list[str | int | float | None]]]:
        """Return the head and the rows of the table: one a task and mode over the default."""
        head = ["task", "mode", "use", "decision", "n", *FORMS]
        rows: list[list[str | int | float | None]] = []
        for name, one in self.effects.items():
            unread = {arm.mode: arm.unparsed for arm in one.arms}
            rows += [
                [
                    name,
                    pair.mode,
                    one.chosen,
                    one.decision,
                    pair.n,
                    pair.delta,
                    *pair.ci,
                    pair.p,
                    pair.net,
                    pair.extra_tokens,
                    f"{unread[pair.over]} / {unread[pair.mode]}",
                    pair.delta_parsed,
                ]
                for pair in one.pairs
                if pair.over == self.default
            ]
        return head, rows

    def report(self) -> str:
        """Return the table for a terminal, what was noted, and how well the card guesses."""
        told = [report.aligned(*self.rows(), FORMS)]
        told += [f"{name}: {note}" for name, one in self.effects.items() for note in one.notes]
        if self.card is not None and self.card.auc is not None:
            told.append(f"card of {self.card.tasks} tasks: area {self.card.auc:.2f}, each left out")
        return "\n\n".join(told)

    def page(self, title: str = "Does thinking pay?", subtitle: str = "") -> str:
        """Return a page with gains and tokens of each task, and the table."""
        pairs = [
            (f"{name}, {pair.mode}", pair)
            for name, one in self.effects.items()
            for pair in one.pairs
            if pair.over == self.default
        ]
        bars = report.bars(
            f"Accuracy gained over {self.default}",
            {name: 100 * pair.delta for name, pair in pairs},
            unit=" points",
            errors={name: 50 * (pair.ci[1] - pair.ci[0]) for name, pair in pairs},
            marked=[f"{name}, {one.chosen}" for name, one in self.effects.items()],
        )
        parts = [
            report.section(
                "Gains",
                "Set apart in colour: modes to use. Whiskers reach half the width of the 95 % "
                "interval to either side, as it was at the end of the measurement.",
                bars,
            ),
            report.section("All figures", report.table(*self.rows(), FORMS)),
        ]
        notes = [f"{name}: {note}" for name, one in self.effects.items() for note in one.notes]
        if notes:
            parts.insert(0, report.notes(notes, warning=True))
        return report.page(title, parts, subtitle=subtitle)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; of the embedding only its name."""
        card = self.card
        return {
            "format": FORMAT,
            "default": self.default,
            "thinking": self.thinking,
            "cutoff": self.cutoff,
            "embed": "letters" if self.embed is letters else "other",
            "card": None
            if card is None
            else {"weights": list(card.weights), "tasks": card.tasks, "auc": card.auc},
            "effects": [one.to_dict() for one in self.effects.values()],
            "places": {name: list(place) for name, place in self.places.items()},
        }

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the policy as JSON. Raises OutputError if it exists or cannot be written."""
        check_output(path, overwrite)
        with whole_file(path) as part:
            part.write_text(json.dumps(self.to_dict(), indent=1), "utf-8")

    @classmethod
    def load(cls, path: str | Path, *, embed: Embed | None = None) -> "CoTPolicy":
        """Read a policy. `embed` is needed if it was made with one of your own.

        Raises MissingError, FormatError, or InputError without the embedding.
        """
        where = Path(path).expanduser()
        try:
            told = json.loads(where.read_text("utf-8"))
        except FileNotFoundError:
            raise MissingError(f"{where}: no such policy; write one with save") from None
        except (OSError, ValueError) as error:
            raise FormatError(f"{where}: not a policy that can be read ({error})") from None
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise FormatError(f"{where}: no thinking policy; expected the format {FORMAT!r}")
        if told.get("embed") != "letters" and embed is None:
            raise InputError(f"{where}: was made with an embedding of your own; give it as embed")
        try:
            card = told["card"]
            return cls(
                {one["task"]: Effect.of(one) for one in told["effects"]},
                told["default"],
                float(told["cutoff"]),
                None if card is None else Card(tuple(card["weights"]), card["tasks"], card["auc"]),
                told["thinking"],
                embed or letters,
                {name: tuple(place) for name, place in told["places"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{where}: a damaged policy ({type(error).__name__}: {error}); write it anew"
            ) from None


@dataclass(frozen=True)
class Routed:
    """A mode that is another one for each problem."""

    policy: CoTPolicy
    modes: Mapping[str, Mode]
    task: str | None = None
    name: str = "routed"

    @property
    def most_tokens(self) -> int | None:
        """The most of its modes; None if one has no bound."""
        most = [mode.most_tokens for mode in self.modes.values()]
        return None if None in most else max(one for one in most if one is not None)

    def run(self, problem: Problem, model: Generator, budget: Budget | None = None) -> Attempt:
        """Run the mode that the policy chooses."""
        chosen = self.policy.choose(problem if self.task is None else self.task)
        return self.modes[chosen.mode].run(problem, model, budget)


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raise OutputError if a policy could not be written there: before the work."""
    where = Path(path).expanduser()
    if where.is_dir() or (where.exists() and not overwrite):
        raise OutputError(f"{where}: exists; choose another name, or overwrite it if it is a file")
    if not where.parent.is_dir() or not os.access(where.parent, os.W_OK):
        raise OutputError(f"{where.parent}: no folder that may be written into; create it")


def _place(vectors: Sequence[Sequence[float]]) -> list[float]:
    units = [_unit(one) for one in vectors]
    return _unit([sum(column) for column in zip(*units, strict=True)])


def _unit(vector: Sequence[float]) -> list[float]:
    told = [float(one) for one in vector]
    size = math.sqrt(sum(one * one for one in told))
    if not 0 < size < math.inf:
        raise InputError("an embedding is empty, zero or not finite; give a function that tells")
    return [one / size for one in told]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))

"""A repair as a small file: which heads look where, on which task, found how.

    circuit_repair: 1
    task: colored_objects_natural
    heads: ["24.4", "29.0"]      # layer.head
    look_at: [wrong1, wrong2]    # positions that the task's prompts name
    model: models/smol           # optional: beside the recipe first
    prompts: 48
    seed: 0
    random_sets: 10              # as many other heads, drawn; how good is chance?
    note: negative movers of ioi

It applies to a run only, and needs the answer key (which options are wrong): a causal test, not a
changed model.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from pluribus.core.errors import RecipeError
from pluribus.core.whole import whole_file
from pluribus.inspect.circuits.circuit import head_of, name_of
from pluribus.inspect.circuits.endings import Endings
from pluribus.inspect.circuits.measure import Score
from pluribus.inspect.circuits.model import Head, HeadModel
from pluribus.inspect.circuits.prompts import Prompts
from pluribus.inspect.circuits.tasks import get
from pluribus.recipe.single import Placed, fault, single


class Repair(Placed):
    """Heads of a model, and the positions that they are to look at."""

    circuit_repair: Literal[1]
    task: str
    heads: list[str] = Field(min_length=1)
    look_at: list[str] = Field(min_length=1)
    model: str | None = None
    prompts: int = Field(48, ge=1)
    seed: int = Field(0, ge=0)
    random_sets: int = Field(10, ge=0)
    note: str = ""

    @field_validator("task")
    @classmethod
    def _known(cls, value: str) -> str:
        return get(value).name

    @field_validator("heads", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Refuse numbers: YAML reads 24.10 without quotes as 24.1, which is another head."""
        if not isinstance(value, list):
            return value
        for one in value:
            if isinstance(one, float):
                raise ValueError(f"{one!r} is a number to YAML; put heads in quotes: '{one!r}'")
        return [name_of(head_of(one)) if isinstance(one, str) else one for one in value]

    def chosen(self) -> list[Head]:
        """Return the heads as numbers."""
        return [head_of(name) for name in self.heads]


@dataclass(frozen=True)
class Repaired:
    """How a task went without and with a repair, and with random heads in their place."""

    repair: Repair
    none: Score
    repaired: Score
    random: tuple[Score, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""

        def told(score: Score) -> dict[str, Any]:
            return {
                "accuracy": score.accuracy,
                "among": score.among,
                "logit_difference": score.mean_difference,
            }

        new = [
            i
            for i, (was, now) in enumerate(zip(self.none.hits, self.repaired.hits, strict=True))
            if was and not now
        ]
        return {
            "task": self.repair.task,
            "heads": self.repair.heads,
            "look_at": self.repair.look_at,
            "prompts": len(self.none.hits),
            "seed": self.repair.seed,
            "none": told(self.none),
            "repaired": told(self.repaired),
            "random": [told(score) for score in self.random],
            "new_mistakes": len(new),
        }


def load(path: str | os.PathLike[str]) -> Repair:
    """Read a repair. Raises MissingError, or RecipeError with file, line and the nearest key."""
    path = Path(path).expanduser()
    document = single(path, "a repair")
    try:
        repair = Repair.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(fault(error, str(path), document)) from None
    repair._folder = path.parent
    return repair


def save(repair: Repair, path: str | os.PathLike[str]) -> None:
    """Write a repair. Raises OutputError if that cannot be done."""
    told = repair.model_dump(exclude_none=True)
    lines = [
        "# Heads that look, from the last token, at set places. Edit it, then:",
        f"# pluribus circuits repair {Path(path).name} --model MODEL",
        yaml.safe_dump(told, sort_keys=False, default_flow_style=None),
    ]
    with whole_file(path) as part:
        part.write_text("\n".join(lines), "utf-8")


def apply(repair: Repair, heads: HeadModel, prompts: Prompts, on_step: Any = None) -> Repaired:
    """Score a repair on prompts of its task.

    Raises InputError for heads that the model has not, and positions that the prompts lack.
    """
    endings = Endings(heads, prompts, on_step)
    chosen = repair.chosen()
    repaired = endings.force_attention(chosen, repair.look_at)
    others = [
        (layer, head)
        for layer in range(heads.layers)
        for head in range(heads.heads)
        if (layer, head) not in chosen
    ]
    rng = random.Random(f"repair/{repair.seed}")
    scores = []
    for number in range(repair.random_sets if len(others) >= len(chosen) else 0):
        drawn = rng.sample(others, len(chosen))
        scores.append(endings.force_attention(drawn, repair.look_at))
        if on_step is not None:
            on_step("random heads", number + 1, repair.random_sets)
    return Repaired(repair, endings.score(), repaired, tuple(scores))

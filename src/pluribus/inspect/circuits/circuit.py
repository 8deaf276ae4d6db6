"""A task's circuit: heads found backwards from the logits, stage by stage, and how two compare.

    circuit = discover(heads, IOI, prompts)
    circuit.save("ioi.json")
    overlap(circuit, Circuit.load("colored.json"))         # jaccard, overlap, chance

At each stage the heads of largest |e| stay, a share `top` of all heads; the circuit is the union.
What was chosen (share, positions, receivers) changes the circuit, so it is kept with it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pluribus.core.errors import FormatError, InputError, MismatchError, MissingError
from pluribus.core.whole import whole_file
from pluribus.inspect.circuits.measure import evaluate
from pluribus.inspect.circuits.model import Head, HeadModel
from pluribus.inspect.circuits.patching import Effects, OnStep, path_patch, top
from pluribus.inspect.circuits.prompts import Prompts, PromptTask, Stage

FORMAT = 1
DRAWS = 200  # of the bootstrap


@dataclass(frozen=True)
class Found:
    """What one stage found."""

    stage: Stage
    receivers: tuple[tuple[int, int, str], ...]  # layer, head (q) or group (k, v), side
    effects: tuple[tuple[float | None, ...], ...]  # (l, h); None: no sender
    heads: tuple[Head, ...]  # largest |e| first
    frequency: tuple[float, ...]  # of each, share of draws of the bootstrap that kept it

    def effect(self, head: Head) -> float:
        """Return a head's effect; NaN if it was no sender."""
        value = self.effects[head[0]][head[1]]
        return float("nan") if value is None else value

    def signed(self, only: str) -> list[Head]:
        """Return the kept heads with positive, negative or any effect."""
        sign = {"all": 0, "positive": 1, "negative": -1}[only]
        return [head for head in self.heads if not sign or sign * self.effect(head) > 0]


@dataclass(frozen=True)
class Circuit:
    """The heads that a model uses for a task."""

    task: str
    model: str
    layers: int
    heads_per_layer: int
    groups: int  # of keys and values
    stages: tuple[Found, ...]
    top: float  # share of heads that a stage keeps
    prompts: int
    seed: int
    accuracy: float
    clean: float  # mean logit difference
    corrupt: float
    warnings: tuple[str, ...] = field(default=())

    @property
    def heads(self) -> list[Head]:
        """Return all stages' heads, each once, in order of layers."""
        return sorted({head for found in self.stages for head in found.heads})

    def stage(self, name: str) -> Found:
        """Return what a stage found. Raises InputError if there is no such stage."""
        for found in self.stages:
            if found.stage.name == name:
                return found
        known = ", ".join(found.stage.name for found in self.stages)
        raise InputError(f"the circuit of {self.task} has no stage {name!r}; it has {known}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "format": FORMAT,
            "task": self.task,
            "model": self.model,
            "layers": self.layers,
            "heads_per_layer": self.heads_per_layer,
            "groups": self.groups,
            "top": self.top,
            "prompts": self.prompts,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "logit_difference": {"clean": self.clean, "corrupt": self.corrupt},
            "warnings": list(self.warnings),
            "heads": [name_of(head) for head in self.heads],
            "stages": [
                {
                    **vars(found.stage),
                    "receivers": [list(one) for one in found.receivers],
                    "heads": {name_of(head): found.effect(head) for head in found.heads},
                    "frequency": {
                        name_of(head): share
                        for head, share in zip(found.heads, found.frequency, strict=True)
                    },
                    "effects": [list(row) for row in found.effects],
                }
                for found in self.stages
            ],
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Circuit":
        """Return what `to_dict` gave. Raises FormatError for anything else."""
        if not isinstance(told, Mapping) or told.get("format") != FORMAT:
            found = told.get("format") if isinstance(told, Mapping) else type(told).__name__
            raise FormatError(f"not a circuit of format {FORMAT} (format: {found!r})")
        try:
            stages = []
            for one in told["stages"]:
                names = ("name", "side", "of", "only", "position")
                kept = [head_of(name) for name in one["heads"]]
                stages.append(
                    Found(
                        Stage(**{name: one[name] for name in names}),
                        tuple((int(n), int(h), str(side)) for n, h, side in one["receivers"]),
                        tuple(tuple(row) for row in one["effects"]),
                        tuple(kept),
                        tuple(float(one["frequency"][name_of(head)]) for head in kept),
                    )
                )
            return cls(
                stages=tuple(stages),
                clean=float(told["logit_difference"]["clean"]),
                corrupt=float(told["logit_difference"]["corrupt"]),
                warnings=tuple(told["warnings"]),
                **{
                    name: told[name]
                    for name in (
                        *("task", "model", "layers", "heads_per_layer", "groups", "top"),
                        *("prompts", "seed", "accuracy"),
                    )
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"a circuit's file is damaged: {type(error).__name__} {error}"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON. Raises OutputError if that cannot be done."""
        with whole_file(path) as part:
            part.write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read what `save` wrote. Raises MissingError, or FormatError naming the file."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingError(f"{path}: no such circuit; `pluribus circuits discover` writes one")
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except ValueError as error:
            raise FormatError(f"{path}: {error}") from None


def name_of(head: Head) -> str:
    """Return `layer.head`."""
    return f"{head[0]}.{head[1]}"


def head_of(name: str) -> Head:
    """Return the head that `layer.head` names. Raises InputError for anything else."""
    layer, _, head = str(name).strip().partition(".")
    if not (layer.isdecimal() and head.isdecimal()):
        raise InputError(f"{name!r} names no head; write LAYER.HEAD, such as 20.0")
    return int(layer), int(head)


def discover(
    heads: HeadModel,
    task: PromptTask,
    prompts: Prompts,
    *,
    stages: Sequence[Stage] | None = None,
    top_share: float = 0.02,
    seed: int = 0,
    model: str = "",
    allow_small_gap: bool = False,
    on_step: OnStep | None = None,
) -> Circuit:
    """Return the circuit of a task on some prompts; `seed` and `model` are noted in it.

    A stage without receivers (none of the wanted sign was found) is left out with a warning. Raises
    InputError as `path_patch`, and for a share outside (0, 1] or stages in the wrong order.
    """
    if not 0 < top_share <= 1:
        raise InputError(f"top is {top_share}; give a share of all heads, such as 0.02")
    score = evaluate(heads, prompts)
    warnings = []
    if score.accuracy < 0.6:
        warnings.append(
            f"the model answers {score.accuracy:.0%} of {task.name}; the circuit of a task that a "
            "model cannot do says little"
        )
    done: dict[str, Found] = {}
    last: Effects | None = None
    for stage in stages if stages is not None else task.stages:
        receivers: Any = "logits"
        if stage.side != "logits":
            if stage.of not in done:
                raise InputError(f"stage {stage.name!r} needs stage {stage.of!r} before it")
            receivers = [(*head, stage.side) for head in done[stage.of].signed(stage.only)]
            receivers = [one for one in receivers if one[0] > 0]
            if not receivers:
                wanted = "" if stage.only == "all" else f"{stage.only} "
                warnings.append(f"stage {stage.name}: {stage.of} has no {wanted}head above others")
                done[stage.name] = Found(stage, (), (), (), ())
                continue
        told = None if on_step is None else _named(on_step, f"{task.name}: {stage.name}")
        last = path_patch(
            heads,
            prompts,
            receivers,
            position=stage.position,
            allow_small_gap=allow_small_gap,
            on_step=told,
        )
        done[stage.name] = _found(stage, last, top_share, seed)
    if last is None:
        raise InputError("a circuit needs at least one stage")
    return Circuit(
        task=task.name,
        model=model,
        layers=heads.layers,
        heads_per_layer=heads.heads,
        groups=heads.groups,
        stages=tuple(found for found in done.values() if found.heads),
        top=top_share,
        prompts=len(prompts),
        seed=seed,
        accuracy=score.accuracy,
        clean=float(last.clean.mean()),
        corrupt=float(last.corrupt.mean()),
        warnings=tuple(warnings),
    )


def _named(on_step: OnStep, name: str) -> OnStep:
    return lambda _, done, total: on_step(name, done, total)


def _found(stage: Stage, effects: Effects, share: float, seed: int) -> Found:
    """Return a stage's heads, and how often each is kept when prompts are drawn again."""
    values = effects.values
    kept = top(values, share)
    rng = torch.Generator().manual_seed(seed)
    counts = dict.fromkeys(kept, 0)
    for _ in range(DRAWS):
        drawn = torch.randint(len(effects.clean), (len(effects.clean),), generator=rng)
        for head in top(effects.over(drawn), share):
            if head in counts:
                counts[head] += 1
    return Found(
        stage,
        effects.receivers,
        tuple(tuple(None if v != v else v for v in row) for row in values.tolist()),
        tuple(kept),
        tuple(counts[head] / DRAWS for head in kept),
    )


class Overlap(NamedTuple):
    """How much of two circuits is the same."""

    shared: list[Head]
    jaccard: float  # shared over the union
    overlap: float  # shared over the smaller one
    chance: float  # overlap of two sets of these sizes drawn at random, on average


def overlap(one: Circuit, other: Circuit, stage: str | None = None) -> Overlap:
    """Compare two circuits' heads, or one stage's. Raises MismatchError for other models' shapes.

    jaccard = |A & B| / |A | B|; overlap = |A & B| / min(|A|, |B|).
    """
    if (one.layers, one.heads_per_layer) != (other.layers, other.heads_per_layer):
        raise MismatchError(
            f"circuits of models with {one.layers} x {one.heads_per_layer} and {other.layers} x "
            f"{other.heads_per_layer} heads have no heads in common; compare circuits of one model"
        )
    a, b = (set(c.heads if stage is None else c.stage(stage).heads) for c in (one, other))
    return of_sets(a, b, one.layers * one.heads_per_layer)


def of_sets(a: set[Head], b: set[Head], among: int) -> Overlap:
    """Compare two sets of heads among so many. Raises InputError if one is empty."""
    if not a or not b:
        raise InputError("a circuit without heads cannot be compared")
    shared = sorted(a & b)
    chance = len(a) * len(b) / among / min(len(a), len(b))
    return Overlap(shared, len(shared) / len(a | b), len(shared) / min(len(a), len(b)), chance)

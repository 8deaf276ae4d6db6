"""What `pluribus eval` does: open models by reference, get the data, score, one model at a time."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pluribus.core.errors import InputError, MismatchError, nearest
from pluribus.tasks import named, sets
from pluribus.tasks.evaluate import Report, Reports, evaluate_all
from pluribus.tasks.openers import opener
from pluribus.tasks.systems import OnStep, ZooSystem, zoo_tasks
from pluribus.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Models and tasks as they are named on the command line."""

    models: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    shots: int = 0
    seed: int = 0
    specialists: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raise InputError for a device that does not work here."""
        from pluribus.tasks.device import usable

        usable(self.device)


def on_tasks(wanted: Wanted, on_step: OnStep | None = None) -> Reports:
    """Score language models on named tasks; one model is in memory at a time.

    A specialist that is one of the models, by its name or its reference, is scored only once.

    Raises InputError for unknown tasks and specialists of others, before a model is loaded.
    """
    from pluribus.tasks.language import CausalLM

    if not wanted.tasks:
        raise InputError(
            "name tasks: --tasks sst2,trec or a group such as --tasks text14; `pluribus tasks` "
            "lists them"
        )
    tasks = named.expand(wanted.tasks)
    for task in tasks:
        if task.prompt is None:
            raise InputError(
                f"{task.name} is of images, and these are language models; weights of a zoo are "
                "scored with --zoo NAME"
            )
    models = labelled(wanted.models)
    best = _specialists(wanted.specialists, [task.name for task in tasks], models)
    fetch(tasks, on_step)

    def scored(reference: str, label: str, asked: list[Task]) -> tuple[Report, ...]:
        with merged(reference, on_step) as what:
            system = CausalLM.open(
                what,
                label=label,
                shots=wanted.shots,
                device=wanted.device,
                dtype=wanted.dtype,
            )
            made = evaluate_all(
                [system], asked, limit=wanted.limit, seed=wanted.seed, on_step=on_step
            )
        return made.reports

    known = {task: one for task, one in best.items() if isinstance(one, float)}
    others: dict[str, list[Task]] = {}  # specialists that are none of the models
    for task in tasks:
        one = best.get(task.name)
        if isinstance(one, str) and one not in models:
            others.setdefault(one, []).append(task)
    for reference, asked in others.items():
        known |= {report.task: report.score for report in scored(reference, reference, asked)}
    found: list[Report] = []
    for label, reference in models.items():
        found += scored(reference, label, tasks)
    known |= {r.task: r.score for r in found if best.get(r.task) == r.system}
    return Reports(tuple(replace(r, specialist=known.get(r.task)) for r in found))


def on_zoo(wanted: Wanted, name: str, on_step: OnStep | None = None) -> Reports:
    """Score weights of a zoo's encoder on its tasks, normalised to its experts.

    The zoo is named NAME, or NAME:SEED if it was raised with another seed than 0.
    """
    from pluribus.core.weights import Weights
    from pluribus.tasks.zoo import build

    if wanted.specialists or wanted.shots:
        raise InputError("a zoo has its own specialists and no shots; leave these options out")
    name, _, number = name.partition(":")
    if number and not number.isdecimal():
        raise InputError(f"--zoo {name}:{number}: the seed must be a number, as in {name}:1")
    zoo = build(name, int(number or 0), on_step=on_step)
    tasks = zoo_tasks(zoo)
    if wanted.tasks:
        known = {task.name: task for task in tasks}
        for task in wanted.tasks:
            if f"{name}/{task.removeprefix(f'{name}/')}" not in known:
                raise InputError(
                    f"zoo {name} has no task '{task}'; there are: {', '.join(zoo.tasks)}."
                    + nearest(task, zoo.tasks)
                )
        tasks = [known[f"{name}/{task.removeprefix(f'{name}/')}"] for task in wanted.tasks]
    experts = {
        f"{name}/{task}": ZooSystem(zoo=zoo, state=state, label=f"expert {task}")
        for task, state in zoo.experts.items()
    }
    systems: list[ZooSystem] = []
    for label, reference in labelled(wanted.models).items():
        if (found := opener(reference)) is not None:
            systems.append(found.of_zoo(reference, zoo, label, wanted.device))
            continue
        with merged(reference, on_step) as what:
            weights = Weights.open(what)
            state = {tensor: weights[tensor] for tensor in weights}
        try:
            zoo.module(state)  # before any is scored
        except MismatchError as error:
            raise MismatchError(f"{label}: {error}") from None
        systems.append(ZooSystem(zoo=zoo, state=state, label=label))
    return evaluate_all(
        systems,
        tasks,
        limit=wanted.limit,
        seed=wanted.seed,
        specialists={task.name: experts[task.name] for task in tasks},
        on_step=on_step,
    )


def on_harness(wanted: Wanted, include: Path | None = None) -> Reports:
    """Score model folders with lm-evaluation-harness on its tasks."""
    from pluribus.tasks.harness import harness

    if not wanted.tasks:
        raise InputError("name tasks of lm-evaluation-harness with --tasks")
    if wanted.specialists:
        raise InputError("--specialists are of pluribus's own tasks; leave out --harness or them")
    found: list[Report] = []
    for label, reference in labelled(wanted.models).items():
        with merged(reference) as folder:
            found += harness(
                folder,
                wanted.tasks,
                label=label,
                limit=wanted.limit,
                shots=wanted.shots or None,
                seed=wanted.seed,
                include=include,
                device=wanted.device,
                dtype=wanted.dtype,
            )
    return Reports(tuple(found))


def fetch(tasks: list[Task], on_step: OnStep | None = None) -> None:
    """Download the text sets that tasks need and that are not here, as `sets` would.

    Raises DataError if there is something to download and the network is forbidden.
    """
    from pluribus.tasks.download import offline, text_set

    for name, kind in dict.fromkeys(task.data for task in tasks if task.data is not None):
        located = sets.locate(name, kind)
        if located is None or located.place != "public source":
            continue
        if offline():
            raise sets.missing(name, kind)
        text_set(name, sets.cache_folder() / "data", on_bytes=on_step)


def labelled(models: tuple[str, ...]) -> dict[str, str]:
    """Return references by label: of NAME=MODEL the name, else the path's last part if it tells."""
    if len(set(models)) < len(models):
        raise InputError(f"a model is given twice among {', '.join(models)}")
    own: dict[str, str] = {}  # the names given, by model
    for model in models:
        name, equals, _ = model.partition("=")
        if equals and not Path(model).exists() and re.fullmatch(r"[\w .-]+", name):
            if name in own.values():
                raise InputError(f"two models are named {name}; give each its own name")
            own[model] = name
    short = {model: own.get(model) or _short(model) for model in models}
    if len(set(short.values())) < len(models):
        short = {model: own.get(model, model) for model in models}
    return {short[m]: m.partition("=")[2] if m in own else m for m in models}


def _short(model: str) -> str:
    return Path(model).name.removesuffix(".yml").removesuffix(".yaml") or model


@contextmanager
def merged(reference: str, on_step: OnStep | None = None) -> Iterator[Any]:
    """Give what a reference names; a recipe is merged into a folder that goes away afterwards."""
    if not reference.endswith((".yml", ".yaml")) or opener(reference) is not None:
        yield reference
        return
    from pluribus import recipe as recipes

    loaded = recipes.load(Path(reference))
    with tempfile.TemporaryDirectory(prefix="pluribus-eval-") as folder:
        if on_step is not None:
            on_step(f"merging {Path(reference).name}", 0, 1)
        out = Path(folder) / "merged"
        recipes.run(loaded, out, stages_dir=Path(folder) / "stages")
        if on_step is not None:
            on_step(f"merging {Path(reference).name}", 1, 1)
        yield out


def _specialists(
    given: tuple[str, ...], tasks: list[str], models: dict[str, str]
) -> dict[str, str | float]:
    """Return what is named for each task: a score, one of the models' labels, or a reference."""
    labels = {reference: label for label, reference in models.items()}
    found: dict[str, str | float] = {}
    for text in given:
        task, equals, value = text.partition("=")
        if not equals or not value:
            raise InputError(f"--specialists {text!r}: write TASK=MODEL or TASK=SCORE")
        if task not in tasks:
            raise InputError(
                f"--specialists {text!r}: the tasks are {', '.join(tasks)}.{nearest(task, tasks)}"
            )
        if task in found:
            raise InputError(f"--specialists {text!r}: {task} has one already")
        try:
            score = float(value)
        except ValueError:
            found[task] = value if value in models else labels.get(value, value)
            continue
        if not 0 < score <= 1:
            raise InputError(
                f"--specialists {text!r}: a score is above 0 and at most 1, as in {task}=0.93"
            )
        found[task] = score
    return found

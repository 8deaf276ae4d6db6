"""The main job in a minute: eight specialists, many ways to combine them, a table and a report.

Everything runs on the embedded handwritten digits. Hyper-parameters (one scale, where a method has
one) are chosen on validation images; scores are on test images, as shares of the specialist's own.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pluribus.compress import Emr, TallMasks, Twin
from pluribus.core.chain import as_merger
from pluribus.core.errors import OutputError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.engine.driver import merge
from pluribus.engine.provenance import verify
from pluribus.tasks import zoo as zoos

OnStep = Callable[[str, int, int], None]
State = dict[str, Tensor]

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
WIDE = (0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2)
# label, method, scales to choose from (none: nothing to choose)
STATIC: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("average", "linear", ()),
    ("karcher", "karcher", ()),
    ("model_stock", "model_stock", ()),
    ("task_arithmetic", "task_arithmetic(weight=1.0)", GRID),
    ("magmax", "magmax", GRID),
    ("ties", "ties(density=0.2, scope='model', tie='global', count='official')", WIDE),
    ("ties (sum)", "trim(density=0.2) >> elect >> sum", GRID),
    ("dare_ties", "dare_ties(density=0.5, weight=1.0)", GRID),
    ("breadcrumbs", "breadcrumbs(density=0.2, gamma=0.02, scope='row', weight=1.0)", GRID),
    ("pcb", "pcb(ratio=0.2, scale=1.0)", WIDE),
    ("consensus", "consensus(k=2, scale=1.0)", GRID),
    ("tsv_m", "tsv_m", GRID),
    ("iso_c", "iso_c", GRID),
    ("task_arithmetic + lines", "sum >> lines(beta=0.5)", WIDE),
)


@dataclass(frozen=True)
class Row:
    """One way to have all tasks."""

    name: str
    kind: str  # "one model" or "a store"
    score: float  # mean over tasks, share of the specialist's own
    tasks: Mapping[str, float]
    bytes: int
    seconds: float
    setting: str = ""


@dataclass(frozen=True)
class Demo:
    """What the demo found, and where it wrote it."""

    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    expert_scores: Mapping[str, float]
    checkpoint_bytes: int
    seconds: float
    out: Path
    checks: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "rows": [vars(row) for row in self.rows],
            "tasks": list(self.tasks),
            "expert_accuracy": dict(self.expert_scores),
            "checkpoint_bytes": self.checkpoint_bytes,
            "seconds": round(self.seconds, 1),
            "out": str(self.out),
            "checks": list(self.checks),
        }


def run(
    out: str | os.PathLike[str], seed: int = 0, on_step: OnStep | None = None, **sizes: Any
) -> Demo:
    """Train, merge, compress, write, re-load and score; leave everything in the folder `out`.

    `sizes` shrink the zoo (see `pluribus.tasks.zoos.demo8`). Raises OutputError if `out` holds
    something that an earlier demo did not write.
    """
    began = time.perf_counter()
    folder = _folder(Path(out))
    zoo = zoos.build("demo8", seed, on_step=on_step, **sizes)
    base, experts = _specialists(zoo, folder)
    size = base.nbytes
    rows = [
        _row(zoo, "base", "one model", dict(zoo.base), size, 0.0),
        Row("specialists", "a store", 1.0, dict.fromkeys(zoo.tasks, 1.0), size * len(experts), 0.0),
    ]
    states: dict[str, tuple[str, State]] = {}
    for number, (label, method, scales) in enumerate(STATIC):
        if on_step is not None:
            on_step(f"merging: {label}", number, len(STATIC))
        start = time.perf_counter()
        merged = merge(Pool(base, experts), as_merger(method), seed=seed)
        state = {name: merged[name] for name in merged}
        seconds = time.perf_counter() - start
        setting = ""
        if scales:
            scale, state = _best(zoo, state, scales)
            setting = f"scale {scale:g}"
        rows.append(_row(zoo, label, "one model", state, size, seconds, setting))
        states[label] = (method, state)
    checks = _write_best(rows, states, folder)
    rows += _stores(zoo, base, experts, folder, checks, on_step)
    if on_step is not None:
        on_step("merging", len(STATIC), len(STATIC))
    ranked = sorted(rows, key=lambda row: -row.score)
    demo = Demo(
        tuple(ranked),
        tuple(zoo.tasks),
        zoo.expert_scores("test"),
        size,
        time.perf_counter() - began,
        folder,
        tuple(checks),
    )
    from pluribus.demo.page import write

    write(demo, folder / "report.html")
    return demo


def _folder(out: Path) -> Path:
    """Empty a former demo's folder, or make a new one."""
    mark = out / ".pluribus-demo"
    if out.exists() and not mark.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists and was not written by a demo; choose another with --out")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    mark.touch()
    return out


def _specialists(zoo: zoos.Zoo, folder: Path) -> tuple[Weights, dict[str, Weights]]:
    """Write base and experts as checkpoints and open them again: merges read files."""
    home = folder / "specialists"
    home.mkdir()
    Weights.of(zoo.base).save(home / "base.safetensors")
    for task, state in zoo.experts.items():
        Weights.of(state).save(home / f"{task}.safetensors")
    experts = {task: Weights.open(home / f"{task}.safetensors", label=task) for task in zoo.experts}
    return Weights.open(home / "base.safetensors", label="base"), experts


def _row(
    zoo: zoos.Zoo,
    name: str,
    kind: str,
    state: State,
    size: int,
    seconds: float,
    setting: str = "",
) -> Row:
    scores = zoo.normalised(state)
    return Row(name, kind, sum(scores.values()) / len(scores), scores, size, seconds, setting)


def _best(zoo: zoos.Zoo, merged: State, scales: tuple[float, ...]) -> tuple[float, State]:
    """Choose the scale of a merge's update on validation images."""
    tried = []
    for scale in scales:
        state = {n: zoo.base[n] + scale * (merged[n] - zoo.base[n]) for n in merged}
        scores = zoo.normalised(state, "val")
        tried.append((sum(scores.values()), -scale, state))
    _, negative, state = max(tried, key=lambda one: one[:2])
    return -negative, state


def _write_best(
    rows: list[Row], states: Mapping[str, tuple[str, State]], folder: Path
) -> list[str]:
    """Write the best merge as a checkpoint through the driver, re-load and verify it."""
    label = max((row for row in rows if row.name in states), key=lambda row: row.score).name
    _, state = states[label]
    path = folder / "merged.safetensors"
    merge(Pool(None, [state]), "linear", path)
    loaded = Weights.open(path)
    same = all(bool((loaded[name] == state[name]).all()) for name in state)
    faults = list(verify(path))
    return [
        f"merged.safetensors ({label}) written, re-loaded: "
        f"{'same bits' if same and not faults else 'DIFFERS'}"
    ]


def _stores(
    zoo: zoos.Zoo,
    base: Weights,
    experts: Mapping[str, Weights],
    folder: Path,
    checks: list[str],
    on_step: OnStep | None,
) -> list[Row]:
    """Compress the experts in three ways, open the stores again and score what they give back."""
    from pluribus.compress import open_store

    def score(task: str, weights: Weights) -> float:
        return zoo.score({name: weights[name] for name in weights}, task, "val", limit=200)

    methods = {
        "tall_masks": TallMasks(multi="task_arithmetic", grid=(0.2, 0.4, 0.6)),
        "emr": Emr(),
        "twin (rank 16)": Twin(rank=16),
    }
    rows = []
    for number, (label, method) in enumerate(methods.items()):
        if on_step is not None:
            on_step(f"compressing: {label}", number, len(methods))
        start = time.perf_counter()
        home = folder / label.split()[0]
        made = method.fit(base, experts, score, out=home)
        seconds = time.perf_counter() - start
        store = open_store(home, base)
        before = {task: made.expand(task) for task in zoo.tasks}
        scores = {}
        same = True
        for task in zoo.tasks:
            weights = store.expand(task)
            state = {name: weights[name] for name in weights}
            same &= all(bool((state[n] == before[task][n]).all()) for n in state)
            ceiling = zoo.expert_scores("test")[task]
            scores[task] = zoo.score(state, task) / ceiling
        mean = sum(scores.values()) / len(scores)
        told = store.report()
        size = int(told["ratio"] * told["checkpoints_bytes"])
        rows.append(Row(label, "a store", mean, scores, size, seconds))
        checks.append(
            f"{home.name}/ written, re-opened, all experts expanded: "
            f"{'same bits' if same else 'DIFFERS'}"
        )
    return rows

"""Measure what static merges of a zoo's experts score, beside what `inspect` sees in the pool.

    loss(method, pool) = 1 - mean over the pool's tasks of score(merge, t) / score(expert_t, t)

on the first `limit` validation inputs of each task, and on so many test inputs, for every method of
`CANDIDATES` at its fixed parameters. A pool is a zoo's base and some of its experts; which ones, a
seed decides. Measured pools are kept in the cache folder one by one, so that a run that was ended
goes on. They are kept by bed, seed, tasks and methods, not by the methods' code: after changing
that, remove the folder `calibration` there.
"""

import fcntl
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pluribus.core.errors import InputError, OutputError
from pluribus.core.whole import whole_file
from pluribus.inspect.features import features

if TYPE_CHECKING:
    from pluribus.tasks.zoo import Zoo

CANDIDATES = (
    "linear",
    "task_arithmetic(scale=0.2)",
    "task_arithmetic(scale=0.3)",
    "task_arithmetic(scale=0.5)",
    "ties(density=0.2)",
    "lines(beta=0.3)",
    "consensus(scale=0.3)",
    "pcb",
    "tsv_m",
    "iso_c",
    "model_stock",
)
DENSITY = 0.2  # of the supports, as `inspect` takes them by default
Split = Literal["val", "test"]
SPLITS: tuple[Split, ...] = ("val", "test")
OnPool = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """One pool: where it comes from, what `inspect` sees, what every candidate loses."""

    bed: str
    seed: int
    tasks: tuple[str, ...]
    features: dict[str, float]
    loss: dict[str, float]  # by candidate; 0: as good as the specialists
    base: float  # loss of the base alone
    rules: float  # loss of what the rules of thumb would try
    test: dict[str, float] = field(default_factory=dict)  # the same on test inputs
    rules_test: float = math.nan

    @property
    def label(self) -> str:
        """The bed and how many experts, for people."""
        return f"{self.bed} ({len(self.tasks)} experts)"


@dataclass(frozen=True, kw_only=True)
class Bed:
    """A zoo by name, its settings, and which of its pools are measured."""

    name: str
    zoo: str
    settings: tuple[tuple[str, Any], ...] = ()
    sizes: tuple[int, ...] = (2, 2, 3, 4, 5, 6)  # experts of each pool
    limit: int = 200  # validation inputs of each task, and test inputs

    def pools(self, tasks: Sequence[str], seed: int) -> list[tuple[str, ...]]:
        """Choose the pools: different ones, in the zoo's order of tasks."""
        draw = random.Random(f"{self.name} {seed}")
        found: list[tuple[str, ...]] = []
        for size in self.sizes:
            if size > len(tasks):
                continue
            for _ in range(20):  # small zoos have few pools of a size
                chosen = set(draw.sample(list(tasks), size))
                pool = tuple(task for task in tasks if task in chosen)
                if pool not in found:
                    found.append(pool)
                    break
        return found


def measure_pool(
    zoo: "Zoo", bed: str, tasks: Sequence[str], limit: int, methods: Sequence[str] = CANDIDATES
) -> Measured:
    """Merge some of a zoo's experts with every method, and score on those tasks.

    Raises InputError for fewer than two tasks, or experts that equal the base.
    """
    from pluribus.core.pool import Pool
    from pluribus.engine.driver import merge
    from pluribus.inspect.advice import advise
    from pluribus.inspect.inspection import inspect

    if len(tasks) < 2:
        raise InputError(f"a pool of {len(tasks)} expert(s) has nothing to merge; give two or more")
    pool = Pool(zoo.base, {task: zoo.experts[task] for task in tasks})
    found = inspect(pool, density=DENSITY, threads=1)
    seen = features(found.model, DENSITY)
    if seen is None:
        raise InputError(f"the experts of {', '.join(tasks)} do not differ from their base")
    ceilings = {split: zoo.expert_scores(split, limit) for split in SPLITS}

    def loss(state: Any, split: Split) -> float:
        shares = [zoo.score(state, task, split, limit) / ceilings[split][task] for task in tasks]
        return 1 - sum(shares) / len(shares)

    def merged(method: str) -> tuple[float, float]:
        weights = merge(pool, method, threads=1)
        state = {name: weights[name] for name in weights}
        return loss(state, "val"), loss(state, "test")

    losses = {method: merged(method) for method in methods}
    rules = advise(found.model, found.blocks, DENSITY).text
    ruled = losses[rules] if rules in losses else merged(rules)
    return Measured(
        bed,
        zoo.seed,
        tuple(tasks),
        seen,
        {method: val for method, (val, _) in losses.items()},
        loss(zoo.base, "val"),
        ruled[0],
        {method: test for method, (_, test) in losses.items()},
        ruled[1],
    )


def measure_bed(bed: Bed, seed: int, on_pool: OnPool | None = None) -> list[Measured]:
    """Measure (or read) all pools of a bed; `on_pool(bed, done, pools)` is told of each.

    Raises DataError if the zoo's data is not there.
    """
    from pluribus.tasks import zoo as zoos

    zoo = zoos.build(bed.zoo, seed, **dict(bed.settings))
    pools = bed.pools(list(zoo.tasks), seed)
    found = []
    for done, tasks in enumerate(pools):
        path = _kept(bed, seed, tasks)
        told = _read(path)
        if told is None:
            told = asdict(measure_pool(zoo, bed.name, tasks, bed.limit))
            with whole_file(path, parents=True) as part:
                part.write_text(json.dumps(told))
        found.append(from_dict(told))
        if on_pool:
            on_pool(bed.name, done + 1, len(pools))
    return found


def measure_beds(
    beds: Sequence[Bed], seeds: Sequence[int], on_pool: OnPool | None = None
) -> dict[tuple[str, int], list[Measured]]:
    """Measure (or read) the pools of beds on seeds; returns them by bed and seed.

    Processes that do so at once share them out: each takes what no other has begun, in its own
    order, and waits for the rest at the end. Raises DataError if a zoo's data is not there,
    OutputError if the cache folder can't be written.
    """
    found = {}
    todo = [(bed, seed) for seed in seeds for bed in beds]
    for waits in (False, True):
        others = []
        for bed, seed in todo:
            with _alone(bed, seed, waits) as ours:
                if ours:
                    found[bed.name, seed] = measure_bed(bed, seed, on_pool)
                else:
                    others.append((bed, seed))
        todo = others
    return found


@contextmanager
def _alone(bed: Bed, seed: int, waits: bool) -> Iterator[bool]:
    """Keep other processes from a bed on a seed; tell whether it is ours."""
    from pluribus.tasks.sets import cache_folder

    path = cache_folder() / "calibration" / f"{bed.name}-{seed}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.open("w")
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); $PLURIBUS_CACHE names another folder"
        ) from None
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # this filesystem has no locks
        yield True


def _read(path: Path) -> dict[str, Any] | None:
    """Return what was kept; a damaged file counts as absent."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def kept(bed: Bed, seed: int) -> list[Measured]:
    """Return the pools of a bed that were measured before with these candidates, in no time."""
    from pluribus.tasks.sets import cache_folder

    folder = cache_folder() / "calibration"
    told = [_read(path) for path in sorted(folder.glob(f"{bed.name}-{seed}-*.json"))]
    wanted = list(CANDIDATES)
    found = [from_dict(one) for one in told if one and list(one.get("test") or ()) == wanted]
    return sorted(found, key=lambda one: (len(one.tasks), one.tasks))


def from_dict(told: dict[str, Any]) -> Measured:
    """Return what `asdict` made plain."""
    return Measured(**{**told, "tasks": tuple(told["tasks"])})


def _kept(bed: Bed, seed: int, tasks: Sequence[str]) -> Path:
    from pluribus.tasks.sets import cache_folder

    key = repr((bed.zoo, bed.settings, seed, tasks, bed.limit, CANDIDATES, DENSITY, SPLITS))
    name = f"{bed.name}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return cache_folder() / "calibration" / name

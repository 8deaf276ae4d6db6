"""aTLAS: learn one coefficient for each block of each task vector, from few labels or none.

Zhang et al., NeurIPS 2024, https://arxiv.org/abs/2407.02880, sections 3 to 5.

    theta_j = theta0_j + sum_t c[j, t, g] tau_tj     j a tensor, g a group of its coordinates
    c      <- AdamW from 0 on  sum over tasks of the objective; gradient norm at most `clip`

At the start the model is the base. Nothing is clamped; weight decay lets unused coefficients
shrink. `scope`: one coefficient for each block, one for each task vector ("vector", the isotropic
baseline), or K for each block ("partition": its coordinates are dealt at random into `partitions`
groups, of which only `seed` is kept). What it is for depends on tasks, pool and objective:

    addition    cross_entropy on every expert's task             Atlas.addition()
    few-shot    cross_entropy on a new task; others' experts     Atlas.few_shot()
    negation    Negate: forget a task, hold a control            Atlas.negation("cars")
    test time   Ufm: guesses on the inputs themselves, no label  Atlas.test_time()

those being the authors' settings, but for the few-shot learning rate. Theirs is 0.1, which suits
coefficients that start at 0 and task vectors a hundred times shorter than the weights; "auto" is
0.1 (median |theta0_j| / |tau_tj|) / 100, held within [0.001, 0.1] (ours). The coefficients kept are
those of the epoch with the best validation score, the base's included (see `_judge`); so the result
is never worse than the base on what it was chosen on. `penalty` p adds half the mean over blocks of
|c[j]|_p. `budget` b keeps b blocks at each position, by gradient or at random (see `_budget`);
`linear` learns for the network's first-order view (see `_linear`). `Tip` and `LpPlusPlus` are
adapters to train on top.

Differs from the authors' code: a partition moves tensors of every rank, and each has its own; their
defects in trusting, sharpening and adapters are not kept (see `_trusted`, `loss.ufm`, `_adapters`);
task vectors are float32 unless `task_vector_dtype` says otherwise.

Cost a step: one forward and backward pass for each task (for Ufm another forward), two reads of
the task vectors; memory: one model with its gradient, and the task vectors, b / t of them with a
budget. When it pays: a pool whose experts are relevant, and too few examples for fine-tuning. It
goes wrong with a pool that is not, and it cannot make features that no expert has.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pluribus.core.errors import InputError, listing
from pluribus.core.merger import NonNegative, Positive, PositiveInt
from pluribus.core.pool import Pool
from pluribus.loss import FACTS, loss_of, needs
from pluribus.loss.negate import Negate
from pluribus.loss.ufm import Ufm
from pluribus.tune._adapters import LpPlusPlus, Tip
from pluribus.tune._blend import Blend, Leaves
from pluribus.tune._budget import block_scores, check_budget, drawn, greatest
from pluribus.tune._clipped import Clipped, auto_lr
from pluribus.tune._examples import Augment, Examples, deal, epoch_of, finite
from pluribus.tune._fit import Log, OnStep, Problem, descend
from pluribus.tune._judge import Judge, Validation, forgetting, normalised
from pluribus.tune._linear import Linearised, linear_scores
from pluribus.tune._model import Forward
from pluribus.tune._result import Tuned
from pluribus.tune._streams import check_tasks
from pluribus.tune._trusted import TwoViews, View, in_two_views
from pluribus.tune._tuner import look_at, tuner

__all__ = ["Atlas", "Examples", "LpPlusPlus", "Tip", "linear_scores"]

NEGATION = {  # the authors' multiple of lr 1e-3, and epochs, by data set
    "cars": (5, 20),
    "dtd": (10, 20),
    "eurosat": (5, 3),
    "gtsrb": (5, 5),
    "mnist": (3, 7),
    "resisc45": (2, 10),
    "sun397": (3, 10),
    "svhn": (5, 2),
}


@tuner("atlas", paper="arXiv:2407.02880")
@dataclass(frozen=True, kw_only=True)
class Atlas:
    """Coefficients for blocks of task vectors, from few examples."""

    scope: Literal["block", "vector", "partition"] = "block"
    partitions: PositiveInt = 1  # groups of coordinates of a block, if scope is "partition"
    budget: PositiveInt | None = None  # blocks kept at each position; None: all
    budget_by: Literal["gradient", "random"] = "gradient"
    linear: bool = False
    lr: Literal["auto"] | Positive = "auto"
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: to 0, without a warm-up
    weight_decay: NonNegative = 0.1
    clip: Positive = 1.0  # the gradient's norm, at most
    penalty: Literal[0, 1, 2] = 0
    epochs: PositiveInt = 20
    steps_per_epoch: PositiveInt | None = None  # None: the shortest stream's batches
    batch_size: PositiveInt = 128  # of all tasks together, where whole sets are given
    fewest_batches: int = 0  # see `Examples`: sets of fewer batches are repeated
    keep: Literal["best", "last"] = "best"
    allow_own: bool = False  # a new task's own expert in the pool
    task_vector_dtype: Literal["float16", "bfloat16"] | None = None
    resident: bool = True  # keep the task vectors in memory
    exclude: tuple[str, ...] = ()  # tensors that stay the base's
    seed: int = 0

    @classmethod
    def addition(cls, **changes: Any) -> "Atlas":
        """Return the authors' settings for learning all experts' tasks at once."""
        return cls(**{"lr": 1e-3, "epochs": 20, **changes})

    @classmethod
    def few_shot(cls, **changes: Any) -> "Atlas":
        """Return the authors' settings for a new task, but for their lr of 0.1."""
        told = {"schedule": "cosine", "epochs": 10, "fewest_batches": 10}
        return cls(**{**told, **changes})

    @classmethod
    def negation(cls, data_set: str, **changes: Any) -> "Atlas":
        """Return the authors' settings for forgetting one of their eight data sets."""
        if data_set not in NEGATION:
            raise InputError(
                f"the authors negate {', '.join(NEGATION)}, not {data_set!r}; give lr and epochs"
            )
        times, epochs = NEGATION[data_set]
        return cls(**{"lr": times * 1e-3, "epochs": epochs, **changes})

    @classmethod
    def test_time(cls, **changes: Any) -> "Atlas":
        """Return the authors' settings for learning from unlabelled inputs."""
        return cls(**{"lr": 1e-3, "schedule": "cosine", "epochs": 10, **changes})

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""
        if self.partitions > 1 and self.scope != "partition":
            raise InputError(
                f"atlas: partitions = {self.partitions} with scope = {self.scope!r}: give "
                "scope='partition' too"
            )
        if self.budget is not None and self.scope == "vector":
            raise InputError(
                "atlas: a budget chooses blocks tensor by tensor, and scope='vector' has one "
                "coefficient for all of them; give scope='block'"
            )
        if self.fewest_batches < 0:
            raise InputError(f"atlas: fewest_batches = {self.fewest_batches}: give 0 or more")

    def fit(
        self,
        pool: Pool,
        forward: Forward,
        streams: Mapping[str, Any],
        *,
        objective: str | Callable[..., Any] = "cross_entropy",
        validation: Mapping[str, Any] | None = None,
        select: Callable[[Mapping[str, Tensor]], float] | None = None,
        views: tuple[View, View] | None = None,
        augment: Augment | None = None,
        device: str = "cpu",
        on_step: OnStep | None = None,
    ) -> Tuned:
        """Learn the coefficients of a pool.

        `streams` gives each task's examples: whole, as (inputs, labels), or as the inputs alone for
        an objective that needs no labels, and then dealt in batches of batch_size / tasks; or as
        `Examples`; or as batches, such as a DataLoader. `validation` gives labelled sets by task to
        choose the epoch by; without it those learned from serve, as in the authors' addition. A few
        shots are poor judges: give some. `select(parameters)` judges instead, greater being better.
        `views` are Ufm's weak and strong one, `augment` changes inputs of whole sets as they are
        dealt; all are functions of (inputs, generator). Raises InputError, MismatchError or
        NonFiniteError.
        """
        log = Log()
        loss = loss_of(objective)
        buffers = look_at(pool, forward, log)
        self._check_own(pool, streams, loss)
        if self.budget is not None:
            check_budget(self.budget, pool.experts)
        blend = Blend(
            pool,
            by="model" if self.scope == "vector" else "tensor",
            init=0.0,
            partitions=self.partitions,
            seed=self.seed,
            exclude=(*buffers, *(n for n in self.exclude if n not in buffers)),
            resident=self.resident,
            task_vector_dtype=_dtype(self.task_vector_dtype),
            device=device,
        )
        self._check_groups(blend, log)
        model = Linearised(forward, blend) if self.linear else forward
        only = "update" if self.linear else "merged"
        dealt = deal(
            streams,
            needs(loss) == "labels",
            batch_size=self.batch_size,
            seed=self.seed,
            fewest=self.fewest_batches,
            augment=augment,
        )
        if isinstance(loss, Ufm):
            dealt = in_two_views(
                model,
                blend.parameters(blend.leaves(only=only)),
                dealt,
                loss,
                views=views,
                seed=self.seed,
                device=blend.device,
            )
            for task, made in dealt.items():
                _note_trusted(log, task, made)
        problem = Problem(blend, model, dealt, loss)
        if self.budget is not None:
            kept = (
                greatest(blend, block_scores(problem, blend.leaves(only=only)), self.budget)
                if self.budget_by == "gradient"
                else drawn(blend, self.budget, self.seed)
            )
            blend.keep(kept)
        epoch = epoch_of(dealt, self.steps_per_epoch)
        judge = None
        if self.keep == "best":
            judge = self._judge(problem, dealt, validation, select, loss, log)
        steps = self.epochs * epoch
        lr = auto_lr(blend) if self.lr == "auto" else self.lr
        log.notes.append(f"{steps} steps in {self.epochs} epochs, lr {lr:.3g}")
        descend(
            problem,
            [blend.coefficients],
            torch.optim.AdamW([blend.coefficients], lr=lr, weight_decay=self.weight_decay),
            steps,
            Clipped(problem, self.clip, self.penalty, epoch),
            log=log,
            probe_every=epoch,
            judge=judge,
            stop="last" if judge is None else "best",
            on_step=on_step,
            schedule=_cosine(steps) if self.schedule == "cosine" else None,
            only=only,
        )
        if log.skipped:
            log.warn(
                f"{log.skipped} of {steps} steps were left out: no guess in their batches was sure "
                "enough"
            )
        note = {"method": "atlas", "scope": self.scope, "objective": _name(objective, loss)}
        if self.linear:
            note["linear"] = "the exported weights are base + update; see linear_scores"
        if isinstance(loss, Ufm):
            note["transductive"] = (
                f"adapted on the inputs of {listing(streams)}: scores on them are"
            )
        return Tuned(pool, blend.export(note=note), self, blend.of, log)

    # -- inputs ----------------------------------------------------------------------------------

    def _check_own(self, pool: Pool, streams: Mapping[str, Any], loss: Any) -> None:
        own = [task for task in streams if task in pool.experts]
        others = [label for label in pool.experts if label not in streams]
        if self.allow_own or isinstance(loss, Negate) or not (own and others):
            return
        raise InputError(
            f"the pool holds the expert of {listing(own)} itself, and further ones: for a new task "
            "its own expert would be the answer, learned from all of its data. Leave it out of the "
            f"pool, or give the tasks of {listing(others)} too, or allow_own=True"
        )

    def _check_groups(self, blend: Blend, log: Log) -> None:
        small = [n for n in blend.tensors if blend.base.source(n).spec.size < self.partitions]
        if small and self.partitions > 1:
            log.warn(
                f"{len(small)} tensors have fewer than {self.partitions} entries, so some of their "
                f"groups are empty: {listing(small)}"
            )

    def _judge(
        self,
        problem: Problem,
        dealt: Mapping[str, Any],
        validation: Mapping[str, Any] | None,
        select: Callable[[Mapping[str, Tensor]], float] | None,
        loss: Any,
        log: Log,
    ) -> Callable[[Leaves], float | None] | None:
        """Return what chooses the epoch to keep, or None if there is nothing to choose by."""
        if select is not None:
            return _selected(problem.blend, select, self.linear)
        tasks = problem.streams.tasks
        if validation is None:
            if problem.wants != "labels" or not all(map(finite, dealt.values())):
                log.notes.append("no labelled validation sets: the last step is kept")
                return None
            log.notes.append("the epoch was chosen on the examples that were learned from")
            validation = dealt
        else:
            check_tasks(validation, tasks, "stream")
        judge = Judge(problem, Validation(validation, problem.blend.device))
        if isinstance(loss, Negate):
            return forgetting(judge, loss, log)
        return normalised(judge)


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))


def _selected(
    blend: Blend, select: Callable[[Mapping[str, Tensor]], float], linear: bool
) -> Callable[[Leaves], float]:
    def value(leaves: Leaves) -> float:
        merged = {name: leaf.detach() for name, leaf in leaves.items()}
        if linear:
            merged = {name: blend._base[name] + update for name, update in merged.items()}
        return float(select(blend.parameters(merged)))

    return value


def _note_trusted(log: Log, task: str, made: TwoViews) -> None:
    if empty := made.trusted.empty:
        log.warn(
            f"task {task}: the base names no input as class {listing(map(str, empty), 10)}: no "
            "input of it is trusted, and it can be learned from guesses only"
        )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _name(objective: Any, loss: Any) -> str:
    known = getattr(loss, FACTS, None)
    return known.name if known is not None else getattr(objective, "__name__", "a function")

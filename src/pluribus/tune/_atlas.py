"""What runs `Atlas`: its checks, its data, its judge, and the loop."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluribus.core.errors import InputError, listing
from pluribus.core.pool import Pool
from pluribus.loss import FACTS, needs
from pluribus.loss.negate import Negate
from pluribus.loss.ufm import Ufm
from pluribus.tune._blend import Blend, Leaves
from pluribus.tune._budget import block_scores, check_budget, drawn, greatest
from pluribus.tune._clipped import Clipped, auto_lr
from pluribus.tune._examples import Augment, deal, epoch_of, finite
from pluribus.tune._fit import Log, OnStep, Problem, descend
from pluribus.tune._judge import Judge, Validation, forgetting, normalised
from pluribus.tune._linear import Linearised
from pluribus.tune._model import Forward
from pluribus.tune._result import Tuned
from pluribus.tune._streams import check_tasks
from pluribus.tune._trusted import TwoViews, View, in_two_views
from pluribus.tune._tuner import look_at

if TYPE_CHECKING:
    from pluribus.tune.atlas import Atlas


def fit(
    method: "Atlas",
    pool: Pool,
    forward: Forward,
    streams: Mapping[str, Any],
    *,
    objective: Any,
    loss: Any,
    validation: Mapping[str, Any] | None,
    select: Callable[[Mapping[str, Tensor]], float] | None,
    views: tuple[View, View] | None,
    augment: Augment | None,
    device: str,
    on_step: OnStep | None,
) -> Tuned:
    """Learn the coefficients of a pool; see `Atlas.fit`."""
    log = Log()
    buffers = look_at(pool, forward, log)
    _check_own(method, pool, streams, loss)
    if method.budget is not None:
        check_budget(method.budget, pool.experts)
    blend = Blend(
        pool,
        by="model" if method.scope == "vector" else "tensor",
        init=0.0,
        partitions=method.partitions,
        seed=method.seed,
        exclude=(*buffers, *(n for n in method.exclude if n not in buffers)),
        resident=method.resident,
        task_vector_dtype=_dtype(method.task_vector_dtype),
        device=device,
    )
    _check_groups(method, blend, log)
    model = Linearised(forward, blend) if method.linear else forward
    only = "update" if method.linear else "merged"
    dealt = deal(
        streams,
        needs(loss) == "labels",
        batch_size=method.batch_size,
        seed=method.seed,
        fewest=method.fewest_batches,
        augment=augment,
    )
    if isinstance(loss, Ufm):
        dealt = in_two_views(
            model,
            blend.parameters(blend.leaves(only=only)),
            dealt,
            loss,
            views=views,
            seed=method.seed,
            device=blend.device,
        )
        for task, made in dealt.items():
            _note_trusted(log, task, made)
    problem = Problem(blend, model, dealt, loss)
    if method.budget is not None:
        kept = (
            greatest(blend, block_scores(problem, blend.leaves(only=only)), method.budget)
            if method.budget_by == "gradient"
            else drawn(blend, method.budget, method.seed)
        )
        blend.keep(kept)
    epoch = epoch_of(dealt, method.steps_per_epoch)
    judge = None
    if method.keep == "best":
        judge = _judge(method, problem, dealt, validation, select, loss, log)
    steps = method.epochs * epoch
    lr = auto_lr(blend) if method.lr == "auto" else method.lr
    log.notes.append(f"{steps} steps in {method.epochs} epochs, lr {lr:.3g}")
    descend(
        problem,
        [blend.coefficients],
        torch.optim.AdamW([blend.coefficients], lr=lr, weight_decay=method.weight_decay),
        steps,
        Clipped(problem, method.clip, method.penalty, epoch),
        log=log,
        probe_every=epoch,
        judge=judge,
        stop="last" if judge is None else "best",
        on_step=on_step,
        schedule=_cosine(steps) if method.schedule == "cosine" else None,
        only=only,
    )
    if log.skipped:
        log.warn(
            f"{log.skipped} of {steps} steps were left out: no guess in their batches was sure "
            "enough"
        )
    note = {"method": "atlas", "scope": method.scope, "objective": _name(objective, loss)}
    if method.linear:
        note["linear"] = "the exported weights are base + update; see linear_scores"
    if isinstance(loss, Ufm):
        note["transductive"] = f"adapted on the inputs of {listing(streams)}: scores on them are"
    return Tuned(pool, blend.export(note=note), method, blend.of, log)


def _check_own(method: "Atlas", pool: Pool, streams: Mapping[str, Any], loss: Any) -> None:
    own = [task for task in streams if task in pool.experts]
    others = [label for label in pool.experts if label not in streams]
    if method.allow_own or isinstance(loss, Negate) or not (own and others):
        return
    raise InputError(
        f"the pool holds the expert of {listing(own)} itself, and further ones: for a new task "
        "its own expert would be the answer, learned from all of its data. Leave it out of the "
        f"pool, or give the tasks of {listing(others)} too, or allow_own=True"
    )


def _check_groups(method: "Atlas", blend: Blend, log: Log) -> None:
    small = [n for n in blend.tensors if blend.base.source(n).spec.size < method.partitions]
    if small and method.partitions > 1:
        log.warn(
            f"{len(small)} tensors have fewer than {method.partitions} entries, so some of their "
            f"groups are empty: {listing(small)}"
        )


def _judge(
    method: "Atlas",
    problem: Problem,
    dealt: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    select: Callable[[Mapping[str, Tensor]], float] | None,
    loss: Any,
    log: Log,
) -> Callable[[Leaves], float | None] | None:
    """Return what chooses the epoch to keep, or None if there is nothing to choose by."""
    if select is not None:
        return _selected(problem.blend, select, method.linear)
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

"""From tasks to a zoo: train base, heads and experts, or read them from the cache.

The cache's key covers the sources that decide the result, all settings, the tasks' tensors, a
pre-trained base and torch's version, so an old file is never taken for a new one. How tasks are
made is not in it: their tensors are.
"""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.tasks import cache as store
from pluribus.tasks import heads as head_makers
from pluribus.tasks import specialise
from pluribus.tasks.sets import cache_folder
from pluribus.tasks.specialise import OnStep, Plan, skeleton, threads
from pluribus.tasks.views import TaskData
from pluribus.tasks.zoo import Zoo


def raise_specialists(
    name: str,
    tasks: Mapping[str, TaskData],
    plan: Plan,
    seed: int,
    model: "partial[Any]",
    *,
    cache: bool,
    on_step: OnStep | None,
    base: dict[str, Tensor] | None = None,
    without: str | None = None,
) -> Zoo:
    """Train (or read) base, heads and experts; the last step of a builder.

    `model` makes the encoder from plain values. With a pre-trained `base`, heads are linear probes
    of its features on the first `plan.base_pool` training inputs; without, base and heads are
    trained jointly. The task named by `without` takes part in neither: the zoo holds its data.
    """
    left_out = {task: data for task, data in tasks.items() if task == without}
    tasks = {task: data for task, data in tasks.items() if task != without}
    encoder = skeleton(model)
    parts = _parts(name, tasks, plan, seed, model, encoder, base)
    path = cache_folder() / "zoos" / f"{name}-{seed}-{store.digest(parts)[:16]}.safetensors"
    weights = store.load(path) if cache else None
    if weights is None:
        weights = _trained(encoder, tasks, plan, seed, on_step or _silent, base)
        if cache:
            store.save(path, weights)
    order = list(encoder.state_dict())
    known = base or {n: weights[f"base/{n}"] for n in order}
    ground = {n: known[n] for n in order}
    own = [n for n in order if not (plan.frozen and n.startswith(plan.frozen))]
    return Zoo(
        name=name,
        seed=seed,
        base=ground,
        experts={t: ground | {n: weights[f"expert/{t}/{n}"] for n in own} for t in tasks},
        heads={t: {n: weights[f"head/{t}/{n}"] for n in ("weight", "bias")} for t in tasks},
        tasks=dict(tasks),
        model=model,
        left_out=left_out,
    )


def _parts(
    name: str,
    tasks: Mapping[str, TaskData],
    plan: Plan,
    seed: int,
    model: "partial[Any]",
    encoder: nn.Module,
    base: dict[str, Tensor] | None,
) -> Iterator[str | Tensor]:
    """All that decides the result, for the cache's key."""
    yield repr((name, list(tasks), seed, asdict(plan), torch.__version__))
    yield repr((model.args, sorted(model.keywords.items())))
    used = {type(part).__module__ for part in encoder.modules()}
    used |= {specialise.__name__} | ({head_makers.__name__} if base is not None else set())
    for module in sorted(used):
        if not module.startswith("torch."):
            yield _code(sys.modules[module])
    for task in tasks.values():
        for split in (task.train, task.val, task.test):
            yield from split
    for pair in (base or {}).items():
        yield from pair


def _code(module: ModuleType) -> str:
    """Return a module's source without comments and docstrings, which decide nothing."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _trained(
    encoder: nn.Module,
    tasks: Mapping[str, TaskData],
    plan: Plan,
    seed: int,
    on_step: OnStep,
    base: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Return the tensors of all, by path; those that are the base's by nature are left out."""
    weights = {}
    with threads(plan.threads):
        if base is None:
            ground, heads = specialise.train_base(encoder, tasks, plan, seed, on_step)
            weights |= {f"base/{name}": tensor for name, tensor in ground.items()}
        else:
            ground, heads = base, _probes(encoder, base, tasks, plan, on_step)
        for task, data in tasks.items():
            head = heads[task]
            expert = specialise.train_expert(encoder, ground, head, data, plan, seed, on_step)
            own = {name: tensor for name, tensor in expert.items() if tensor is not ground[name]}
            weights |= {f"expert/{task}/{name}": tensor for name, tensor in own.items()}
            weights |= {f"head/{task}/{name}": tensor for name, tensor in head.items()}
    return weights


def _probes(
    encoder: nn.Module,
    base: dict[str, Tensor],
    tasks: Mapping[str, TaskData],
    plan: Plan,
    on_step: OnStep,
) -> dict[str, dict[str, Tensor]]:
    heads = {}
    for done, (name, task) in enumerate(tasks.items()):
        x, y = task.train.first(plan.base_pool)
        seen = specialise.features(encoder, base, x).clone()  # out of inference mode
        heads[name] = head_makers.probe(seen, y, len(task.classes))
        on_step("heads", done + 1, len(tasks))
    return heads


def _silent(stage: str, done: int, total: int) -> None:
    """Take no notice."""

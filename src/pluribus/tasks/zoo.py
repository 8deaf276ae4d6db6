"""A zoo: one base, one expert and one head per task, and the scores of any weights on all tasks.

    score(theta, t)      = accuracy of head_t over encoder theta on task t
    normalised(theta, t) = score(theta, t) / score(expert_t, t)

Every merge is judged by `normalised`: 1 means as good as the specialist. A zoo is built by one
file of `pluribus.tasks.zoos`, found by its name: `build("merge8", seed=0)`.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from pluribus.core.errors import InputError, MismatchError, listing, nearest
from pluribus.core.shapes import Float
from pluribus.tasks import cache as store
from pluribus.tasks import specialise, views
from pluribus.tasks.sets import cache_folder
from pluribus.tasks.specialise import OnStep, Plan, ResidualMLP, skeleton, threads
from pluribus.tasks.views import TaskData

State = Mapping[str, Tensor]
SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Zoo:
    """Specialists of one base, in a fixed order of tasks, with what is needed to score others."""

    name: str
    seed: int
    base: dict[str, Tensor] = field(repr=False)
    experts: dict[str, dict[str, Tensor]] = field(repr=False)
    heads: dict[str, dict[str, Tensor]] = field(repr=False)  # frozen, shared by all
    tasks: dict[str, TaskData] = field(repr=False)
    model: Callable[[], nn.Module]  # makes the encoder whose weights `base` and `experts` are

    @functools.cached_property
    def _encoder(self) -> nn.Module:
        return skeleton(self.model)

    def features(self, state: State, x: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Return what an encoder with these weights makes of the inputs, in float32."""
        weights = self._fitted(state)
        with torch.inference_mode():
            return functional_call(self._encoder, weights, (x,), strict=True)

    def logits(self, state: State, task: str, x: Float[Tensor, "b n"]) -> Float[Tensor, "b v"]:
        """Return the class scores of the task's head over an encoder with these weights."""
        head = self.heads[self._known(task)]
        return linear(self.features(state, x), head["weight"], head["bias"])

    def score(
        self, state: State, task: str, split: SplitName = "test", limit: int | None = None
    ) -> float:
        """Return the accuracy on the first `limit` images of a split, on all by default."""
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; it must be at least 1, or None for all images")
        x, y = self.tasks[self._known(task)].split(split)
        x, y = x[:limit], y[:limit]
        return float((self.logits(state, task, x).argmax(1) == y).double().mean())

    def scores(
        self, state: State, split: SplitName = "test", limit: int | None = None
    ) -> dict[str, float]:
        """Return the accuracy on every task."""
        state = self._fitted(state)
        return {task: self.score(state, task, split, limit) for task in self.tasks}

    def expert_scores(
        self, split: SplitName = "test", limit: int | None = None
    ) -> dict[str, float]:
        """Return each expert's accuracy on its own task."""
        return dict(self._ceilings(split, limit))

    def normalised(
        self, state: State, split: SplitName = "test", limit: int | None = None
    ) -> dict[str, float]:
        """Return the accuracy on every task over its expert's: 1 is as good as the specialist."""
        ceilings = self._ceilings(split, limit)
        scores = self.scores(state, split, limit)
        return {task: score / ceilings[task] for task, score in scores.items()}

    @functools.cached_property
    def _ceilings(self) -> Callable[[SplitName, int | None], dict[str, float]]:
        @functools.cache
        def ceilings(split: SplitName, limit: int | None) -> dict[str, float]:
            return {t: self.score(expert, t, split, limit) for t, expert in self.experts.items()}

        return ceilings

    def _known(self, task: str) -> str:
        if task not in self.tasks:
            raise InputError(
                f"zoo {self.name} has no task '{task}'; there are: {', '.join(self.tasks)}."
                f"{nearest(task, self.tasks)}"
            )
        return task

    def _fitted(self, state: State) -> dict[str, Tensor]:
        """Return the weights in float32 and the base's order; refuse other names or shapes."""
        if lacking := [name for name in self.base if name not in state]:
            raise MismatchError(f"the weights lack {listing(lacking)} of zoo {self.name}")
        if extra := [name for name in state if name not in self.base]:
            raise MismatchError(f"zoo {self.name} has no {listing(extra)}")
        fitted = {name: state[name].detach().float() for name in self.base}
        for name, tensor in fitted.items():
            if tensor.shape != self.base[name].shape:
                raise MismatchError(
                    f"{name} has shape {list(tensor.shape)}, but {list(self.base[name].shape)} "
                    f"in zoo {self.name}"
                )
        return fitted


def names() -> list[str]:
    """Return the names of all zoos."""
    package = importlib.import_module("pluribus.tasks.zoos")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def build(
    name: str, seed: int = 0, *, cache: bool = True, on_step: OnStep | None = None, **sizes: object
) -> Zoo:
    """Build the named zoo, or read it from the cache; `sizes` are its builder's own parameters.

    `on_step(stage, done, total)` is told of every training step; nothing is printed.
    Raises InputError for an unknown zoo or parameter, DataError for a data set that isn't there.
    """
    if name not in names():
        raise InputError(
            f"no zoo is called '{name}'; there are: {', '.join(names())}.{nearest(name, names())}"
        )
    make = importlib.import_module(f"pluribus.tasks.zoos.{name}").build
    own = [key for key in inspect.signature(make).parameters if key not in ("cache", "on_step")]
    for key in sizes:
        if key not in own:
            raise InputError(
                f"zoo {name} has no parameter '{key}'; there are: {', '.join(own)}."
                f"{nearest(key, own)}"
            )
    return make(seed, cache=cache, on_step=on_step, **sizes)


def raise_specialists(
    name: str,
    tasks: dict[str, TaskData],
    plan: Plan,
    seed: int,
    *,
    cache: bool,
    on_step: OnStep | None,
) -> Zoo:
    """Train (or read) base, heads and experts of a residual MLP; the last step of a builder.

    The cache's key covers the sources that decide the result, the plan, the tasks' tensors and
    torch's version, so an old file is never taken for a new one.
    """
    inputs = next(iter(tasks.values())).train.x.shape[1]
    model = functools.partial(ResidualMLP, inputs, plan.width, plan.depth)
    splits = [s for task in tasks.values() for s in (task.train, task.val, task.test)]
    described = repr((name, list(tasks), seed, asdict(plan), torch.__version__))
    tensors = [tensor for split in splits for tensor in split]
    key = store.digest([described, *map(_source, (specialise, views)), *tensors])
    path = cache_folder() / "zoos" / f"{name}-{seed}-{key[:16]}.safetensors"
    weights = store.load(path) if cache else None
    if weights is None:
        weights = _trained(skeleton(model), tasks, plan, seed, on_step or _silent)
        if cache:
            store.save(path, weights)
    encoder = list(skeleton(model).state_dict())
    return Zoo(
        name=name,
        seed=seed,
        base={n: weights[f"base/{n}"] for n in encoder},
        experts={t: {n: weights[f"expert/{t}/{n}"] for n in encoder} for t in tasks},
        heads={t: {n: weights[f"head/{t}/{n}"] for n in ("weight", "bias")} for t in tasks},
        tasks=tasks,
        model=model,
    )


def _trained(
    encoder: nn.Module, tasks: dict[str, TaskData], plan: Plan, seed: int, on_step: OnStep
) -> dict[str, Tensor]:
    with threads(plan.threads):
        base, heads = specialise.train_base(encoder, tasks, plan, seed, on_step)
        weights = {f"base/{name}": tensor for name, tensor in base.items()}
        for task, data in tasks.items():
            head = heads[task]
            expert = specialise.train_expert(encoder, base, head, data, plan, seed, on_step)
            weights |= {f"expert/{task}/{name}": tensor for name, tensor in expert.items()}
            weights |= {f"head/{task}/{name}": tensor for name, tensor in head.items()}
    return weights


def _source(module: ModuleType) -> str:
    return inspect.getsource(sys.modules[module.__name__])


def _silent(stage: str, done: int, total: int) -> None:
    """Take no notice."""

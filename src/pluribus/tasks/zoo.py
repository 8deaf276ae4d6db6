"""A zoo: one base, one expert and one head per task, and the scores of any weights on all tasks.

    score(theta, t)      = accuracy of head_t over encoder theta on task t
    normalised(theta, t) = score(theta, t) / score(expert_t, t)

Every merge is judged by `normalised`: 1 means as good as the specialist. A zoo is built by one
file of `pluribus.tasks.zoos`, found by its name: `build("merge8", seed=0)`.
"""

import functools
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from pluribus.core.errors import InputError, MismatchError, listing, nearest
from pluribus.core.shapes import Float, Int, Shaped
from pluribus.tasks import specialise
from pluribus.tasks.specialise import OnStep, State, skeleton
from pluribus.tasks.views import Split, TaskData, generator

SplitName = Literal["train", "val", "test"]
PADDED_CHUNK = 64  # inputs of like length that are in the encoder at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Zoo:
    """Specialists of one base, in a fixed order of tasks, with what is needed to score others.

    States are all an encoder's tensors by name: parameters, and buffers such as the statistics of
    batch norms. Scores and features use them in float32, integers as they are, in eval mode.
    """

    name: str
    seed: int
    base: dict[str, Tensor] = field(repr=False)
    experts: dict[str, dict[str, Tensor]] = field(repr=False)
    heads: dict[str, dict[str, Tensor]] = field(repr=False)  # weight, bias; frozen, shared by all
    tasks: dict[str, TaskData] = field(repr=False)
    model: Callable[[], nn.Module]  # makes the encoder whose weights `base` and `experts` are
    left_out: dict[str, TaskData] = field(default_factory=dict, repr=False)  # of base and experts
    lengths: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)  # of padded inputs

    @functools.cached_property
    def _encoder(self) -> nn.Module:
        return skeleton(self.model)

    def module(self, state: State | None = None) -> nn.Module:
        """Return an encoder of its own with a copy of these weights, the base's by default."""
        weights = self._fitted(self.base if state is None else state)
        module = skeleton(self.model)
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        module.load_state_dict(copies, assign=True)
        return module

    def forward(self, params: State, x: Shaped[Tensor, "b ..."], task: str) -> Float[Tensor, "b v"]:
        """Return the class scores of the task's head, differentiable in `params` and `x`.

        `params` may leave out tensors, such as buffers or frozen ones: those are the base's.
        Buffers, such as the statistics of batch norms, are used as given but have no gradient. Runs
        where `x` is, in the dtype of what it is given. Raises MismatchError for a foreign name.
        """
        if extra := [name for name in params if name not in self.base]:
            raise MismatchError(f"zoo {self.name} has no {listing(extra)}")
        weights = {
            name: params[name] if name in params else tensor.to(x.device)
            for name, tensor in self.base.items()
        }
        weights |= {name: weights[name].detach() for name, _ in self._encoder.named_buffers()}
        head = self.heads[self._known(task)]
        features = functional_call(self._encoder, weights, (x,), strict=True)
        return linear(features, *(head[n].to(features) for n in ("weight", "bias")))

    def features(self, state: State, x: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """Return what an encoder with these weights makes of the inputs, in float32.

        The inputs go through in chunks, so memory does not grow with their number; padded ones
        together with others of like length, so that little padding is computed.
        """
        weights = self._fitted(state)
        if self.lengths is None:
            return specialise.features(self._encoder, weights, x)
        order = self.order(x)
        parts = x[order].split(PADDED_CHUNK)
        found = torch.cat([specialise.features(self._encoder, weights, part) for part in parts])
        return found[order.argsort()]

    def order(self, x: Shaped[Tensor, "b ..."]) -> Int[Tensor, " b"]:
        """Return an order in which inputs of like length are neighbours; as given if none is."""
        if self.lengths is None:
            return torch.arange(len(x), device=x.device)
        return self.lengths(x).argsort(stable=True)

    def logits(self, state: State, task: str, x: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b v"]:
        """Return the class scores of the task's head over an encoder with these weights."""
        head = self.heads[self._known(task)]
        return linear(self.features(state, x), head["weight"], head["bias"])

    def score(
        self, state: State, task: str, split: SplitName = "test", limit: int | None = None
    ) -> float:
        """Return the accuracy on the first `limit` inputs of a split, on all by default."""
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; it must be at least 1, or None for all inputs")
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
        """Return the accuracy on every task over its expert's: 1 is as good as the specialist.

        A task without an expert, which only `with_head` makes, has no place in it.
        """
        ceilings = self._ceilings(split, limit)
        scores = self.scores(state, split, limit)
        return {task: scores[task] / ceiling for task, ceiling in ceilings.items()}

    def labelled(
        self, task: str, split: SplitName = "train", batch_size: int = 16, seed: int = 0
    ) -> Iterator[Split]:
        """Return an endless stream of (inputs, labels), shuffled anew each epoch.

        Raises InputError at once if the split has fewer examples than a batch.
        """
        rng = generator(seed, task, f"batches/{split}")
        return self.tasks[self._known(task)].split(split).batches(batch_size, rng)

    def unlabelled(
        self, task: str, split: SplitName = "train", batch_size: int = 16, seed: int = 0
    ) -> Iterator[Shaped[Tensor, "b ..."]]:
        """Return an endless stream of inputs: those of `labelled` without their labels."""
        stream = self.labelled(task, split, batch_size, seed)
        return (x for x, _ in stream)

    def with_head(
        self, task: str, weight: Float[Tensor, "v d"], bias: Float[Tensor, " v"] | None = None
    ) -> "Zoo":
        """Return a zoo in which a task that was left out has a head, though no expert."""
        if task not in self.left_out:
            raise InputError(
                f"zoo {self.name} left out no task '{task}', but "
                f"{', '.join(self.left_out) or 'none'}; build it with without='{task}'"
            )
        data = self.left_out[task]
        shape = (len(data.classes), next(iter(self.heads.values()))["weight"].shape[1])
        if weight.shape != shape:
            raise MismatchError(
                f"the head of {task} has shape {list(weight.shape)}, expected {list(shape)}: "
                "one row a class, as wide as the features"
            )
        head = {"weight": weight, "bias": weight.new_zeros(len(weight)) if bias is None else bias}
        return replace(
            self,
            heads=self.heads | {task: head},
            tasks=self.tasks | {task: data},
            left_out={name: other for name, other in self.left_out.items() if name != task},
        )

    def to(self, device: torch.device | str) -> "Zoo":
        """Return the zoo with all its tensors on a device."""

        def moved(weights: State) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in weights.items()}

        def all_moved(states: Mapping[str, State]) -> dict[str, dict[str, Tensor]]:
            return {name: moved(weights) for name, weights in states.items()}

        return replace(
            self,
            base=moved(self.base),
            experts=all_moved(self.experts),
            heads=all_moved(self.heads),
            tasks={name: task.to(device) for name, task in self.tasks.items()},
            left_out={name: task.to(device) for name, task in self.left_out.items()},
        )

    def described(self) -> dict[str, Any]:
        """Return name, seed, size and the test accuracies of base and experts as plain values."""
        base, own = self.scores(self.base), self.expert_scores()
        rows = {
            task: {
                "classes": len(data.classes),
                "train": len(data.train.y),
                "test": len(data.test.y),
                "base": base[task],
                "specialist": own.get(task),
            }
            for task, data in self.tasks.items()
        }
        return {
            "zoo": self.name,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self._encoder.parameters()),
            "base": sum(base.values()) / len(base),
            "specialists": sum(own.values()) / len(own),
            "tasks": rows,
        }

    @functools.cached_property
    def _ceilings(self) -> Callable[[SplitName, int | None], dict[str, float]]:
        @functools.cache
        def ceilings(split: SplitName, limit: int | None) -> dict[str, float]:
            return {t: self.score(expert, t, split, limit) for t, expert in self.experts.items()}

        return ceilings

    def _known(self, task: str) -> str:
        if task in self.left_out:
            raise InputError(
                f"zoo {self.name} was built without task '{task}'; give it a head with `with_head`"
            )
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
        fitted = {}
        for name, own in self.base.items():
            tensor = state[name].detach()
            if tensor.shape != own.shape:
                raise MismatchError(
                    f"{name} has shape {list(tensor.shape)}, but {list(own.shape)} "
                    f"in zoo {self.name}"
                )
            fitted[name] = tensor.to(torch.float32 if own.is_floating_point() else own.dtype)
        return fitted


def names() -> list[str]:
    """Return the names of all zoos."""
    package = importlib.import_module("pluribus.tasks.zoos")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def builder(name: str) -> Callable[..., Zoo]:
    """Return what builds the named zoo; `vision8-pretrained` is `vision8_pretrained`.

    Raises InputError for an unknown name.
    """
    known = name.replace("-", "_")
    if known not in names():
        raise InputError(
            f"no zoo is called '{name}'; there are: {', '.join(names())}.{nearest(known, names())}"
        )
    return importlib.import_module(f"pluribus.tasks.zoos.{known}").build


def sizes(name: str) -> dict[str, inspect.Parameter]:
    """Return the named zoo's own parameters, with their types and defaults."""
    given = inspect.signature(builder(name)).parameters
    return {key: given[key] for key in given if key not in ("seed", "cache", "on_step")}


def summary(name: str) -> str:
    """Return one sentence about a zoo: the first line of its builder's file."""
    return (sys.modules[builder(name).__module__].__doc__ or "").partition("\n")[0]


def parsed(name: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of a zoo written as KEY=VALUE, in the types its builder wants.

    Raises InputError for what is no such pair, an unknown key, or a value of another type.
    """
    own = sizes(name)
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"size '{pair}': write KEY=VALUE, such as {next(iter(own))}=100")
        kind = own[_own(name, key)].annotation
        found[key] = _value(key, text, kind)
    return found


def _value(key: str, text: str, kind: Any) -> object:
    if kind is bool:
        values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in values:
            raise InputError(f"{key} is '{text}'; it must be true or false")
        return values[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            whole = "a whole number" if kind is int else "a number"
            raise InputError(f"{key} is '{text}'; it must be {whole}") from None
    return text  # a name, which the builder checks


def _own(name: str, key: str) -> str:
    own = sizes(name)
    if key not in own:
        raise InputError(
            f"zoo {name} has no parameter '{key}'; there are: {', '.join(own)}.{nearest(key, own)}"
        )
    return key


def build(
    name: str, seed: int = 0, *, cache: bool = True, on_step: OnStep | None = None, **given: object
) -> Zoo:
    """Build the named zoo, or read it from the cache; `given` are its builder's own parameters.

    `on_step(stage, done, total)` is told of every training step; nothing is printed.
    Raises InputError for an unknown zoo or parameter, a choice that isn't one or a size below 1,
    DataError for a data set that isn't there, ExtraError for a package that isn't.
    """
    check_sizes(name, given)
    return builder(name)(seed, cache=cache, on_step=on_step, **given)


def check_sizes(name: str, given: Mapping[str, object]) -> None:
    """Raise InputError for parameters of a zoo that it hasn't, of another type or out of range."""
    own = sizes(name)
    for key, value in given.items():
        kind = own[_own(name, str(key))].annotation
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind)
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = {bool: isinstance(value, bool), int: whole, float: whole or isinstance(value, float)}
        if wanted is not None and not fits[kind]:
            raise InputError(f"{key} of zoo {name} is {value!r}; it must be {wanted}")
        if get_origin(kind) is Literal and value not in get_args(kind):
            choices = " or ".join(map(repr, get_args(kind)))
            raise InputError(f"{key} of zoo {name} is {value!r}; it must be {choices}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        low = 1 if isinstance(value, int) else 0
        if number and (not math.isfinite(value) or value < low or value == 0):  # type: ignore[operator]
            bound = "at least 1" if low else "finite and above 0"
            raise InputError(f"{key} of zoo {name} is {value}; it must be {bound}")

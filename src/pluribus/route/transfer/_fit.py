"""Train what stands at the layers and a head on few labelled inputs; keep the best validation.

The base runs in eval mode, so that its dropout and batch norms rest, and none of its tensors train.
Inputs are a tensor (b, ...) or, for models called by keywords, tensors by name; of token ids, the
columns that are padding in every row of a batch are left out.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, linear

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.shapes import Int, Shaped
from pluribus.route.adapters import Attached, Placement, attach
from pluribus.route.features import Features
from pluribus.route.transfer._mix import Fused, Mixer, Scaled, summands
from pluribus.tasks.heads import Head

Inputs = Shaped[Tensor, "b ..."] | Mapping[str, Tensor]
OnStep = Callable[[str, int, int], None]

ROWS = 256  # that are scored at a time


class Examples(NamedTuple):
    """Inputs and their class indices."""

    x: Inputs
    y: Int[Tensor, " b"]


class Target(NamedTuple):
    """A task to learn. Without `val` the last step is kept; `test` is scored once, at the end."""

    train: Examples
    val: Examples | None = None
    test: Examples | None = None


@runtime_checkable
class Data(Protocol):
    """What has the splits of a `Target`: so has `pluribus.tasks.views.TaskData`."""

    @property
    def train(self) -> Any:
        """Inputs and classes to learn from."""

    @property
    def val(self) -> Any:
        """Inputs and classes that choose the step."""

    @property
    def test(self) -> Any:
        """Inputs and classes for the last word."""


class Score(NamedTuple):
    """How a model does on some examples: share that is right, and mean loss in nats."""

    accuracy: float
    loss: float


class Point(NamedTuple):
    """One validation on the way: training loss since the last one, and the score."""

    step: int
    loss: float
    val: Score | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast. Raises InputError for what is out of range."""

    epochs: int
    steps: int | None
    batch_size: int
    lr: float
    head_lr: float
    weight_decay: float
    patience: int | None
    checks: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size", "patience", "checks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; it must be finite and above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay is {self.weight_decay}; it must be 0 or more")


class Learner:
    """A model with a mixer at its layers and a head behind its features."""

    def __init__(
        self, model: nn.Module, mixer: Mixer, features: Features, stage: str, head: Head
    ) -> None:
        self.model, self.mixer, self.head = model, mixer, head
        self.features, self.stage = features, stage

    def logits(self, x: Inputs) -> Tensor:
        """Return class scores (b, v)."""
        return linear(self.embedded(x).to(self.head["weight"]), **self.head)

    def embedded(self, x: Inputs) -> Tensor:
        """Return the features (b, d)."""
        if isinstance(x, Mapping):
            return self.features(self.model, **trimmed(x))
        return self.features(self.model, x)

    def score(self, found: Examples) -> Score:
        """Return accuracy and loss."""
        self.mixer.eval()
        right, loss = 0, 0.0
        with torch.no_grad():
            for part in pieces(found, ROWS):
                scores = self.logits(part.x)
                right += int((scores.argmax(1) == part.y).sum())
                loss += float(cross_entropy(scores, part.y, reduction="sum"))
        self.mixer.train()
        return Score(right / len(found.y), loss / len(found.y))

    def width(self, attached: Attached, first: Examples) -> int:
        """Return how wide the features are. Raises MismatchError for layers that do not run."""
        self.mixer.eval()
        with torch.no_grad():
            found = self.embedded(at(first, slice(0, 1)).x)
        self.mixer.train()
        attached.check_ran()
        return found.shape[-1]

    def learn(
        self, splits: Mapping[str, Examples], plan: Plan, rng: Generator, on_step: OnStep | None
    ) -> tuple[int, list[Point]]:
        """Train, and leave mixer and head as they were at the best validation (or the last step).

        Returns that step and all validations. Raises NonFiniteError for a loss that is none.
        """
        train, val = splits["train"], splits.get("val")
        size = min(plan.batch_size, len(train.y))
        epoch = -(-len(train.y) // size)
        total = plan.steps or plan.epochs * epoch
        every = max(epoch, -(-total // plan.checks))
        optimiser = torch.optim.AdamW(
            [
                {"params": list(self.mixer.parameters()), "lr": plan.lr},
                {"params": list(self.head.values()), "lr": plan.head_lr},
            ],
            weight_decay=plan.weight_decay,
        )
        starts = [group["lr"] for group in optimiser.param_groups]
        best: tuple[tuple[float, float], int, Any, Any] | None = None
        history: list[Point] = []
        lost, since = 0.0, 0
        self.mixer.train()
        for step, rows in enumerate(dealt(len(train.y), size, total, rng), 1):
            for group, start in zip(optimiser.param_groups, starts, strict=True):
                group["lr"] = start * (1 - (step - 1) / total)
            batch = at(train, rows)
            loss = cross_entropy(self.logits(batch.x), batch.y)
            if not bool(loss.isfinite()):
                raise NonFiniteError(
                    f"{self.stage}: the loss is {float(loss.detach())} at step {step}; "
                    f"try a smaller lr than {plan.lr}, and look at the inputs"
                )
            whole = loss
            if isinstance(self.mixer, Scaled) and self.mixer.regulariser:
                whole = loss + self.mixer.regulariser * self.mixer.penalty()
            optimiser.zero_grad()
            whole.backward()
            optimiser.step()
            lost += float(loss.detach())
            since += 1
            if step % every == 0 or step == total:
                score = None if val is None else self.score(val)
                history.append(Point(step, lost / since, score))
                lost, since = 0.0, 0
                key = (0.0, float(step)) if score is None else (score.accuracy, -score.loss)
                if best is None or key > best[0]:
                    best = (key, step, *copy.deepcopy((self.mixer.state_dict(), self.head)))
                elif plan.patience is not None and step - best[1] >= plan.patience * every:
                    if on_step is not None:
                        on_step(self.stage, total, total)
                    break
            if on_step is not None:
                on_step(self.stage, step, total)
        assert best is not None
        _, kept, state, head = best
        self.mixer.load_state_dict(state)
        self.mixer.eval().requires_grad_(False)
        self.head = {name: tensor.detach() for name, tensor in head.items()}
        if isinstance(self.mixer, Fused):
            self.mixer.get_buffer("attention").zero_()
        return kept, history


def headed(head: int | nn.Linear | Head, width: int, device: torch.device) -> Head:
    """Return a trainable copy of a head, or one at 0 for a number of classes.

    Raises InputError for fewer than two classes, MismatchError for a head of another width.
    """
    if isinstance(head, int):
        if head < 2:
            raise InputError(f"a head of {head} classes; give at least 2")
        made = {"weight": torch.zeros(head, width), "bias": torch.zeros(head)}
    elif isinstance(head, nn.Linear):
        weight = head.weight
        made = {"weight": weight, "bias": weight.new_zeros(len(weight))}
        if head.bias is not None:
            made["bias"] = head.bias
    else:
        made = dict(head)
    if set(made) != {"weight", "bias"} or made["weight"].ndim != 2:
        raise InputError('a head is a number of classes, a linear layer, or {"weight", "bias"}')
    classes, found = made["weight"].shape
    if found != width or made["bias"].shape != (classes,):
        raise MismatchError(
            f"the head has weight {[classes, found]} and bias {list(made['bias'].shape)}, but the "
            f"model's features are {width} wide; give [{classes}, {width}] and [{classes}]"
        )
    return {
        name: made[name].detach().to(device).clone().requires_grad_() for name in ("weight", "bias")
    }


def checked(splits: Mapping[str, Examples], classes: int | None = None) -> None:
    """Raise MismatchError for labels that do not fit their inputs or the head's classes."""
    for name, found in splits.items():
        count = len(next(iter(found.x.values())) if isinstance(found.x, Mapping) else found.x)
        if not len(found.y) or count != len(found.y):
            raise MismatchError(
                f"{name} has {count} inputs and {len(found.y)} labels; give one label each, and at "
                "least one"
            )
        low, high = int(found.y.min()), int(found.y.max())
        if classes is not None and (low < 0 or high >= classes):
            raise MismatchError(
                f"the labels of {name} go from {low} to {high}, but the head has {classes} "
                "classes, counted from 0"
            )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode with nothing to train, and put back what it was."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def running(
    model: nn.Module, mixer: Mixer, paths: tuple[str, ...], placement: Placement
) -> Iterator[Attached]:
    """Run a mixer in a frozen model."""
    with frozen(model), attach(model, summands(mixer, paths), placement) as attached:
        yield attached


def at(found: Examples, rows: Tensor | slice) -> Examples:
    """Return some examples."""
    x = found.x
    some = {n: t[rows] for n, t in x.items()} if isinstance(x, Mapping) else x[rows]
    return Examples(some, found.y[rows])


def pieces(found: Examples, size: int) -> Iterator[Examples]:
    """Yield examples in their order, `size` at a time."""
    for start in range(0, len(found.y), size):
        yield at(found, slice(start, start + size))


def trimmed(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the columns behind the last token that any row's attention mask has."""
    mask = x.get("attention_mask")
    if mask is None:
        return dict(x)
    end = max(1, int(mask.any(0).nonzero().max()) + 1) if bool(mask.any()) else 1
    same = {n for n, t in x.items() if t.shape[:2] == mask.shape}
    return {n: t[:, :end] if n in same else t for n, t in x.items()}


def dealt(count: int, size: int, total: int, rng: Generator) -> Iterator[Tensor]:
    """Deal all rows in a new order each epoch, until `total` batches are dealt."""
    done = 0
    while done < total:
        for rows in torch.randperm(count, generator=rng).split(size)[: total - done]:
            yield rows
            done += 1

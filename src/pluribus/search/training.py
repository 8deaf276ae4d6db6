"""A child program: build a module from a point, train it, score it on held-out data.

    evaluate(point) = score(argmin_w L_train(w, build(point)), validation)

Every algorithm runs on one `Training`. Those that try points one after another call it: each trial
starts from new weights. Those with shared weights use its parts: `build` makes the network of all
points (see `pluribus.search.supernet`), and `train`, `val`, `loss` and `optimiser` drive it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError, MismatchError
from pluribus.core.random import key
from pluribus.core.shapes import Float, Int


class Examples(NamedTuple):
    """Inputs and what is to be made of them, first axis alike."""

    x: Tensor
    y: Tensor


def accuracy(outputs: Float[Tensor, "b v"], y: Int[Tensor, " b"]) -> float:
    """Return the share of rows whose largest output is the label's."""
    return float((outputs.argmax(1) == y).double().mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """Trains what `build` makes of a point; called with a point it returns the score.

    Equal points give equal scores on one machine and number of threads: `seed` decides the first
    weights and the order of examples. Weights are learned by SGD with Nesterov momentum under a
    cosine from `lr` to `lr_end`, gradients clipped to norm `clip`.
    """

    build: Callable[[Any], nn.Module] = field(repr=False)
    train: Examples = field(repr=False)
    val: Examples = field(repr=False)
    epochs: int = 1
    batch: int = 50  # an incomplete last batch is left out
    lr: float = 0.1
    lr_end: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    loss: Callable[[Tensor, Tensor], Tensor] = field(default=cross_entropy, repr=False)
    score: Callable[[Tensor, Tensor], float] = field(default=accuracy, repr=False)
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raise MismatchError for inputs without targets, InputError for sizes that can't train."""
        for name, (x, y) in (("train", self.train), ("val", self.val)):
            if len(x) != len(y) or not len(x):
                raise MismatchError(
                    f"{name} has {len(x)} inputs and {len(y)} targets; expected as many, and some"
                )
        for name, value in (("epochs", self.epochs), ("batch", self.batch), ("lr", self.lr)):
            if not value > 0:
                raise InputError(f"{name} = {value}; expected a number above 0")
        if self.batch > len(self.train.x):
            raise InputError(
                f"batch = {self.batch} but there are {len(self.train.x)} training examples"
            )

    def __call__(self, point: Any, report: Any = None) -> float:
        """Train a point from new weights and return its score on the validation examples."""
        return self.scored(self.fitted(point), self.val)

    def made(self, point: Any) -> nn.Module:
        """Build a point's module; the first weights depend on `seed` alone.

        Raises InputError if `build` returns no module.
        """
        module = seeded(self.build, point, seed=key(self.seed, "training", "weights"))
        if not isinstance(module, nn.Module):
            raise InputError(
                f"build returned a {type(module).__name__} for {point!r}; expected a torch module"
            )
        return module.to(self.device)

    def fitted(self, point: Any) -> nn.Module:
        """Return a point's module after `epochs` epochs from new weights."""
        module = self.made(point).train()
        if not any(True for _ in module.parameters()):
            return module
        optimiser = self.optimiser(module)
        steps = self.epochs * self.steps
        for step, (x, y) in enumerate(self.batches("weights", self.epochs)):
            set_rate(optimiser, self.rate(step, steps))
            self.descend(optimiser, module, self.loss(module(x), y))
        return module

    def scored(self, module: nn.Module, examples: Examples, batch: int = 1000) -> float:
        """Return the score of a module in evaluation mode, and leave it in the mode it was in."""
        mode = module.training
        module.eval()
        with torch.no_grad():
            outputs = [module(x.to(self.device)) for x in examples.x.split(batch)]
        module.train(mode)
        return self.score(torch.cat(outputs), examples.y.to(self.device))

    @property
    def steps(self) -> int:
        """Number of batches in an epoch."""
        return len(self.train.x) // self.batch

    def batches(
        self, purpose: str, epochs: int = 1, examples: Examples | None = None
    ) -> Iterator[Examples]:
        """Yield shuffled batches of the training examples, in an order that `purpose` names."""
        x, y = examples or self.train
        size = min(self.batch, len(x))
        rng = Generator().manual_seed(key(self.seed, "training", f"batches {purpose}"))
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=rng)
            for rows in order[: len(x) // size * size].split(size):
                yield Examples(x[rows].to(self.device), y[rows].to(self.device))

    def optimiser(self, module: nn.Module) -> torch.optim.SGD:
        """Return the optimiser of a module's weights."""
        return torch.optim.SGD(
            module.parameters(),
            self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at a step: a cosine from `lr` to `lr_end`."""
        return self.lr_end + (self.lr - self.lr_end) * (1 + math.cos(math.pi * step / steps)) / 2

    def descend(self, optimiser: torch.optim.SGD, module: nn.Module, loss: Tensor) -> None:
        """Take one step of the weights; none if the loss depends on no weights."""
        if not loss.requires_grad:
            return
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), self.clip)
        optimiser.step()


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def seeded(make: Callable[..., Any], *arguments: Any, seed: int) -> Any:
    """Call `make` while torch's global generator starts from `seed`; put the old one back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*arguments)

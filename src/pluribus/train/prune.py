"""Global L1 pruning: the smallest weights of all layers together go, and stay away.

Han et al., https://arxiv.org/abs/1506.02626, with one cut over all layers (as
`torch.nn.utils.prune.global_unstructured` has it) and without its wrappers: a mask is a dictionary
beside the module, whose weights are really zero.

    k = round(amount n) of the n weights with the smallest |w| become 0; biases and norms stay
    tuning: SGD on the loss, the mask applied after every step

Weights of equal size at the cut go by `torch.topk`, as in torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.shapes import Int, Shaped

Masks = dict[str, Tensor]  # by the weight's name; True where it stays
Loss = Callable[[Tensor, Tensor], Tensor]
PRUNED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Plain SGD for some epochs. Raises InputError for settings that cannot be used."""

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 1e-4
    epochs: int = 200
    batch_size: int = 128

    def __post_init__(self) -> None:
        if not (isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr = {self.lr!r}: give a learning rate above 0")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum = {self.momentum!r}: give 0 or more, below 1")
        if not (isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay = {self.weight_decay!r}: give 0 or more")
        if self.epochs < 0 or self.batch_size < 1:
            raise InputError(
                f"epochs = {self.epochs!r}, batch_size = {self.batch_size!r}: give 0 or more "
                "epochs of batches of 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which share of the weights goes, and how the others are tuned after it."""

    amount: float = 0.98
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        if not 0 <= self.amount < 1:
            raise InputError(
                f"amount = {self.amount!r}: give the share of weights that go, from 0 and below 1"
            )


def weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what pruning may touch: the weights of linear and convolution layers, by name."""
    found = {}
    for path, part in module.named_modules():
        if isinstance(part, PRUNED):
            found[f"{path}.weight" if path else "weight"] = part.weight
    return found


def masks(module: nn.Module, amount: float) -> Masks:
    """Return the masks without which `amount` of all weights would be left.

    Raises InputError for a share outside 0 .. 1 or a module without such weights; NonFiniteError
    for NaN or infinite ones.
    """
    if not 0 <= amount <= 1:
        raise InputError(f"amount = {amount!r}: give the share of weights that go, 0 to 1")
    found = weights(module)
    if not found:
        raise InputError(
            f"{type(module).__name__} has no linear or convolution layer, so nothing to prune"
        )
    for name, weight in found.items():
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"{name} holds NaN or infinity, whose size says nothing")
    sizes = torch.cat([weight.detach().abs().reshape(-1) for weight in found.values()])
    keep = torch.ones_like(sizes, dtype=torch.bool)
    keep[torch.topk(sizes, round(amount * len(sizes)), largest=False).indices] = False
    parts = keep.split([weight.numel() for weight in found.values()])
    return {
        name: part.reshape(weight.shape).clone()
        for (name, weight), part in zip(found.items(), parts, strict=True)
    }


@torch.no_grad()
def apply(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights that masks leave out to zero, in place. Raises MismatchError."""
    found = weights(module)
    for name, mask in masks.items():
        if name not in found or found[name].shape != mask.shape:
            held = f"is {list(found[name].shape)}" if name in found else "is not in the module"
            raise MismatchError(f"{name} {held}, but the mask is {list(mask.shape)}")
    for name, mask in masks.items():
        found[name].masked_fill_(~mask.to(found[name].device), 0.0)


def nonzeros(module: nn.Module) -> int:
    """Return how many numbers other than 0 the parameters hold."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in module.parameters())


def tune(
    module: nn.Module,
    x: Shaped[Tensor, "b ..."],
    y: Int[Tensor, " b"],
    how: Tuning,
    rng: Generator,
    masks: Mapping[str, Tensor] | None = None,
    loss: Loss = cross_entropy,
) -> int:
    """Train a module in place, what masks leave out staying 0, and return the number of steps.

    `rng` shuffles. A last batch of one row is left out where there are others, for batch norms.
    Raises InputError without examples, and NonFiniteError, the module then being spoilt, if it
    diverges.
    """
    if not len(y):
        raise InputError("there are no examples to tune on")
    device = next(module.parameters()).device
    x, y = x.to(device), y.to(device)
    optimiser = torch.optim.SGD(
        module.parameters(), lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay
    )
    steps = 0
    module.train()
    try:
        for epoch in range(how.epochs):
            for rows in torch.randperm(len(y), generator=rng).split(how.batch_size):
                if len(rows) == 1 < len(y):
                    continue
                rows = rows.to(device)
                found = loss(module(x[rows]), y[rows])
                if not torch.isfinite(found.detach()):
                    raise NonFiniteError(
                        f"the loss became {float(found.detach())} in epoch {epoch + 1} of "
                        f"{how.epochs}; lower the learning rate (here {how.lr:g})"
                    )
                optimiser.zero_grad()
                found.backward()
                optimiser.step()
                if masks:
                    apply(module, masks)
                steps += 1
    finally:
        module.eval()
        module.zero_grad()
    return steps


def prune(
    module: nn.Module,
    x: Shaped[Tensor, "b ..."],
    y: Int[Tensor, " b"],
    how: Pruning,
    rng: Generator,
    loss: Loss = cross_entropy,
) -> Masks:
    """Prune a module in place, tune what is left on examples, and return the masks.

    Raises what `masks` and `tune` raise.
    """
    found = masks(module, how.amount)
    apply(module, found)
    tune(module, x, y, how.tuning, rng, found, loss)
    return found

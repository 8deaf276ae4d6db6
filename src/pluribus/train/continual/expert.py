"""Networks that a stream learner makes, asks and trains: one step at a time, chance by purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.random import key
from pluribus.core.shapes import Float, Int, Shaped
from pluribus.train import prune
from pluribus.train.continual.network import stream
from pluribus.train.continual.reservoir import Reservoir

CHUNK = 1024  # rows that are in a network at a time when nothing is learnt
Head = Literal["logits", "sigmoid"]


@dataclass(frozen=True, eq=False)
class Expert:
    """A network, in eval mode between steps, and what its training needs."""

    net: nn.Module
    steps: int = 0
    optimiser: torch.optim.SGD | None = None  # of the current expert alone
    masks: prune.Masks | None = None  # once it is pruned

    def saved(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return copies of what a step changes."""
        own = None if self.optimiser is None else self.optimiser.state_dict()
        return deepcopy((self.net.state_dict(), own))

    def restore(self, saved: tuple[dict[str, Any], dict[str, Any] | None]) -> None:
        """Put back what a step has changed, wherever it stopped."""
        self.net.zero_grad()
        self.net.eval()
        self.net.load_state_dict(saved[0])
        if self.optimiser is not None and saved[1] is not None:
            self.optimiser.load_state_dict(saved[1])


@dataclass(frozen=True, eq=False)
class Networks:
    """How networks are made, asked and trained on one device."""

    outputs: int
    head: Head
    device: torch.device
    seed: int

    def loss(self, logits: Float[Tensor, "b c"], y: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy of logits, or of their sigmoids, in nats."""
        return cross_entropy(logits.sigmoid() if self.head == "sigmoid" else logits, y)

    def made(
        self,
        factory: Callable[[], nn.Module],
        purpose: str,
        x: Shaped[Tensor, "b ..."],
        outputs: int | None = None,
        others: tuple[nn.Module, ...] = (),
    ) -> nn.Module:
        """Return a new network that takes such samples.

        Raises InputError if the factory gives a module that it gave before, and MismatchError if
        that does not take the samples or has another number of outputs.
        """
        wanted = self.outputs if outputs is None else outputs
        with self.drawing(purpose):
            net = factory().to(self.device).eval()
        if any(net is other for other in others):
            raise InputError(
                f"{purpose}: the factory gave the same module again; it must make a new one"
            )
        if not any(True for _ in net.parameters()):
            raise InputError(f"{purpose}: the network has no parameters, so it cannot learn")
        try:
            with torch.no_grad():
                out = net(x[:2].to(self.device))
        except (RuntimeError, ValueError) as error:
            raise MismatchError(
                f"{purpose}: the network does not take samples of shape {list(x.shape[1:])} "
                f"({str(error).splitlines()[0]})"
            ) from None
        if tuple(out.shape) != (len(x[:2]), wanted):
            raise MismatchError(
                f"{purpose}: the network gives {list(out.shape)} for {len(x[:2])} sample(s), "
                f"expected {[len(x[:2]), wanted]}"
            )
        return net

    @torch.no_grad()
    def asked(self, net: nn.Module, x: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b c"]:
        """Return the logits of samples on the CPU, some of them at a time."""
        return torch.cat([net(part.to(self.device)).float().cpu() for part in x.split(CHUNK)])

    @torch.no_grad()
    def measured(
        self, net: nn.Module, x: Shaped[Tensor, "b ..."], y: Int[Tensor, " b"], where: str
    ) -> float:
        """Return the mean loss in eval mode. Raises NonFiniteError for NaN or infinity."""
        found = float(self.loss(net(x), y))
        if not isfinite(found):
            raise NonFiniteError(
                f"{where}: the loss is {found}, which would hide every shift, so the batch is not "
                "learned; look for NaN in it, or lower the learning rate"
            )
        return found

    def step(
        self, expert: Expert, x: Shaped[Tensor, "b ..."], y: Int[Tensor, " b"], where: str
    ) -> None:
        """Train one step in place. Raises NonFiniteError for a gradient that is NaN or infinite."""
        net, optimiser = expert.net, expert.optimiser
        assert optimiser is not None
        try:
            net.train()
            optimiser.zero_grad()
            with self.drawing(where):
                self.loss(net(x), y).backward()
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                raise NonFiniteError(
                    f"{where}: the gradient holds NaN or infinity; lower the learning rate (here "
                    f"{optimiser.param_groups[0]['lr']:g})"
                )
            optimiser.step()
            if expert.masks:
                prune.apply(net, expert.masks)
        finally:
            optimiser.zero_grad()
            net.eval()

    def pruned(
        self, expert: Expert, samples: Reservoir, how: prune.Pruning, purpose: str
    ) -> Expert:
        """Return an expert with a pruned copy of its network. Raises what `prune` raises."""
        net, kept = deepcopy(expert.net), samples.kept()
        with self.drawing(purpose):
            masks = prune.prune(
                net, kept.x, kept.y, how, stream(self.seed, purpose, "shuffling"), self.loss
            )
        return replace(expert, net=net, masks=masks, optimiser=None)

    @contextmanager
    def drawing(self, purpose: str) -> Iterator[None]:
        """Let torch's own draws depend on the seed and a purpose, and leave no trace in them."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(key(self.seed, purpose, "draws") >> 1)
            yield

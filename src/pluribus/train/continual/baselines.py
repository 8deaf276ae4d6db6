"""What IBCL is compared with: a chain of posteriors, rehearsal, GEM, and retraining on everything.

Nguyen et al., ICLR 2018, https://arxiv.org/abs/1710.10628 (VCL: the posterior of one task is the
prior of the next; with a coreset of earlier examples); Lopez-Paz and Ranzato, NeurIPS 2017,
https://arxiv.org/abs/1706.08840 (GEM), section 3.

    sequential   q_i = inference with prior q_{i-1} on task i's data; one model for all preferences
    rehearsal    the same on task i's data and `memory` examples of each earlier task; for a
                 preference one more inference, in which task l's examples weigh w_l N / N_l
    GEM          min_z |g - z|^2 / 2  with  <z, g_l> >= 0 for the gradients g_l of earlier memories:
                 z = g + G^T v,  v = argmin_{v >= 0} |G^T v + g|^2 / 2
    joint        all tasks' data at once, task l's examples weigh w_l N / N_l; one training a
                 preference: what IBCL saves

All use the networks, the data and the `Inference` settings of `CredalBase`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.shapes import Float
from pluribus.train.continual.network import Labelled, Network, State, batches, stream
from pluribus.train.continual.posterior import GaussianPosterior
from pluribus.train.continual.preference import Preference, shares
from pluribus.train.continual.preference import sweep as preferences
from pluribus.train.continual.variational import Inference, centred, fit


class Trained(NamedTuple):
    """A model and the optimiser steps it took."""

    state: State
    steps: int


class SequentialPosterior:
    """One posterior that moves from task to task (VCL without a coreset)."""

    def __init__(
        self,
        net_factory: Callable[[], nn.Module],
        prior_std: float = 0.25,
        how: Inference | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.network = Network(net_factory, device)
        self.how, self.seed, self.steps = how or Inference(), seed, 0
        self.posterior: GaussianPosterior = centred(self.network, prior_std)
        self.tasks: tuple[str, ...] = ()

    def learn(self, task_name: str, data: Any) -> None:
        """Move the posterior to a task. Raises what `CredalBase.learn` raises."""
        known = _new(self.network, self.tasks, task_name, data)
        rng = stream(self.seed, task_name, "sequential")
        found = fit(self.network, self.posterior, known, self.how, rng, task=task_name)
        self.network.settle(known, task_name)
        self.posterior, self.steps = found.posterior, self.steps + found.steps
        self.tasks = (*self.tasks, task_name)

    def mean(self, preference: Preference, *, normalise: bool = False) -> State:
        """Return the mean, which no preference changes; a wrong one is refused all the same."""
        shares(preference, self.tasks, normalise=normalise)
        return self.posterior.mu

    def model(self, preference: Preference, *, normalise: bool = False) -> list[State]:
        """Return the mean as the only model."""
        return [self.mean(preference, normalise=normalise)]

    def sweep(
        self, task: str, points: int, rest: Preference | None = None
    ) -> Iterator[tuple[dict[str, float], State]]:
        """Give preferences with a rising share of one task, and always the same model."""
        for preference in preferences(task, points, self.tasks, rest):
            yield preference, self.mean(preference)


class Rehearsal:
    """VCL with a memory of earlier examples; every preference is one more training."""

    def __init__(
        self,
        net_factory: Callable[[], nn.Module],
        prior_std: float = 0.25,
        how: Inference | None = None,
        *,
        memory: int = 100,  # examples kept of each task
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if memory < 1:
            raise InputError(f"memory = {memory!r}: keep at least 1 example of each task")
        self.network = Network(net_factory, device)
        self.how, self.memory, self.seed, self.steps = how or Inference(), memory, seed, 0
        self.posterior: GaussianPosterior = centred(self.network, prior_std)
        self._before, self._last = self.posterior, None
        self._kept: dict[str, Labelled] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks learned, in their order."""
        return tuple(self._kept)

    def learn(self, task_name: str, data: Any) -> None:
        """Move the posterior to a task, rehearsing the others; raises as `CredalBase.learn`."""
        known = _new(self.network, self.tasks, task_name, data)
        parts = {**self._kept, task_name: known}
        found = self._fitted(parts, dict.fromkeys(parts, 1 / len(parts)), self.posterior, "learn")
        self.network.settle(known, task_name)
        self._before, self._last = self.posterior, known
        self.posterior = found.posterior
        rows = torch.randperm(len(known.y), generator=stream(self.seed, task_name, "memory"))
        rows = rows[: self.memory]
        self._kept[task_name] = Labelled(known.x[rows], known.y[rows])

    def train(self, preference: Preference, *, normalise: bool = False) -> State:
        """Train for a preference, on the last task's data and the memory; return the mean."""
        parts = shares(preference, self.tasks, normalise=normalise)
        wanted = dict(zip(self.tasks, parts, strict=True))
        assert self._last is not None  # `shares` refuses to prefer among no tasks
        data = {**self._kept, self.tasks[-1]: self._last}
        return self._fitted(data, wanted, self._before, repr(parts)).posterior.mu

    def _fitted(
        self,
        parts: Mapping[str, Labelled],
        wanted: Mapping[str, float],
        prior: GaussianPosterior,
        purpose: str,
    ):
        task = list(parts)[-1]
        data, importance = _pooled(parts, wanted)
        rng = stream(self.seed, task, f"rehearsal {purpose}")
        found = fit(self.network, prior, data, self.how, rng, task=task, importance=importance)
        self.steps += found.steps
        return found


class GradientEpisodicMemory:
    """GEM: gradients are turned so that no earlier task's memory gets worse to first order."""

    def __init__(
        self,
        net_factory: Callable[[], nn.Module],
        how: Inference | None = None,
        *,
        memory: int = 100,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if memory < 1:
            raise InputError(f"memory = {memory!r}: keep at least 1 example of each task")
        self.network = Network(net_factory, device)
        self.how, self.memory, self.seed, self.steps = how or Inference(), memory, seed, 0
        self.state = self.network.initial(net_factory, seed, "gem")
        self._kept: dict[str, Labelled] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks learned, in their order."""
        return tuple(self._kept)

    def learn(self, task_name: str, data: Any) -> None:
        """Train on a task. Raises what `CredalBase.learn` raises."""
        network = self.network
        known = _new(network, self.tasks, task_name, data)
        rng = stream(self.seed, task_name, "gem")
        memories = [_moved(kept, network) for kept in self._kept.values()]

        def turned(flat: Tensor, gradient: Tensor) -> Tensor:
            if not memories:
                return gradient
            earlier = [
                torch.autograd.grad(network.losses(network.named(flat), *kept).mean(), flat)[0]
                for kept in memories
            ]
            return projected(gradient, torch.stack(earlier))

        flat, steps = _minimised(network, self.state, known, None, self.how, rng, turned, task_name)
        network.settle(known, task_name)
        self.state, self.steps = network.kept(flat), self.steps + steps
        rows = torch.randperm(len(known.y), generator=stream(self.seed, task_name, "memory"))
        rows = rows[: self.memory]
        self._kept[task_name] = Labelled(known.x[rows], known.y[rows])


def projected(gradient: Float[Tensor, " n"], earlier: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """Return the vector nearest to a gradient whose product with no earlier one is negative.

    Solves GEM's dual by coordinate descent in float64, each coordinate exactly in turn.
    """
    rows, toward = earlier.double(), gradient.double()
    if (rows @ toward >= 0).all():
        return gradient
    gram, linear = rows @ rows.T, rows @ toward
    multipliers = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for _ in range(1000):
        before = multipliers.clone()
        for i in range(len(rows)):
            if gram[i, i] > 0:
                rest = gram[i] @ multipliers - gram[i, i] * multipliers[i]
                multipliers[i] = (-(linear[i] + rest) / gram[i, i]).clamp(min=0)
        if float((multipliers - before).abs().max()) <= 1e-12 * (1 + float(multipliers.max())):
            break
    return (toward + rows.T @ multipliers).to(gradient)


def joint(
    net_factory: Callable[[], nn.Module],
    data: Mapping[str, Any],
    preference: Preference,
    how: Inference | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    normalise: bool = False,
) -> Trained:
    """Train one model on all tasks' data, weighted by a preference.

    Raises InputError for a preference outside the simplex, and what `Network.checked` raises.
    """
    how, network = how or Inference(), Network(net_factory, device)
    known: dict[str, Labelled] = {}
    for task, given in data.items():
        known[task] = network.checked(given, task)
        network.settle(known[task], task)
    parts = shares(preference, tuple(known), normalise=normalise)
    pool, importance = _pooled(known, dict(zip(known, parts, strict=True)))
    start = network.initial(net_factory, seed, "joint")
    rng = stream(seed, repr(parts), "joint")
    flat, steps = _minimised(network, start, pool, importance, how, rng, None, "joint training")
    return Trained(network.kept(flat), steps)


def _minimised(
    network: Network,
    start: State,
    data: Labelled,
    importance: Tensor | None,
    how: Inference,
    rng: Generator,
    turned: Callable[[Tensor, Tensor], Tensor] | None,
    task: str,
) -> tuple[Tensor, int]:
    """Minimise the mean (weighted) loss with Adam; `turned` may change each gradient."""
    flat = network.flat(start).requires_grad_()
    optimiser = torch.optim.Adam([flat], lr=how.lr, fused=True)
    x, y = _moved(data, network)
    weights = None if importance is None else importance.to(network.device)
    total = how.total(len(y))
    for step, rows in enumerate(batches(len(y), how.batch_size, total, rng)):
        rows = rows.to(network.device)
        losses = network.losses(network.named(flat), x[rows], y[rows])
        loss = (losses if weights is None else losses * weights[rows]).mean()
        if not torch.isfinite(loss.detach()):
            raise NonFiniteError(
                f"{task}: the loss became {float(loss.detach())} at step {step + 1} of {total}; "
                f"lower the learning rate (here {how.lr:g})"
            )
        (gradient,) = torch.autograd.grad(loss, flat)
        flat.grad = gradient if turned is None else turned(flat, gradient)
        optimiser.step()
    return flat.detach(), total


def _pooled(
    parts: Mapping[str, Labelled], wanted: Mapping[str, float]
) -> tuple[Labelled, Float[Tensor, " b"]]:
    """Return all examples, and weights with which task l counts w_l of them all."""
    count = sum(len(part.y) for part in parts.values())
    weights = [
        torch.full((len(part.y),), wanted[task] * count / len(part.y))
        for task, part in parts.items()
    ]
    x = torch.cat([part.x for part in parts.values()])
    return Labelled(x, torch.cat([part.y for part in parts.values()])), torch.cat(weights)


def _moved(data: Labelled, network: Network) -> Labelled:
    return Labelled(data.x.to(network.device, torch.float32), data.y.to(network.device))


def _new(network: Network, tasks: tuple[str, ...], name: str, data: Any) -> Labelled:
    if not name or name in tasks:
        raise InputError(f"the task name {name!r} is {'taken' if name else 'empty'}")
    return network.checked(data, name)

"""Mean-field variational inference with a Gaussian prior: one step of the chain of posteriors.

Blundell et al., ICML 2015, https://arxiv.org/abs/1505.05424; as IBCL's code uses it
(https://arxiv.org/abs/2310.02995).

    loss = kl_weight KL(N(mu, exp(rho)^2), prior) + sum_{batch} -log p(y | x, mu + exp(rho) eps)

with one eps a step for the whole batch. `kl_weight="elbo"` is B / N, with which an epoch's losses
sum to the negative evidence bound of the data; 1.0 counts the KL once a mini-batch, N / B times as
much. Differs from the code: the KL is in closed form, where that takes one sample of log q - log p,
and mu and sigma start from the prior unless `warm_start=False` (0 and 1 there).
"""

from dataclasses import dataclass
from math import ceil, isfinite
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.shapes import Float
from pluribus.train.continual.network import Labelled, Network, batches
from pluribus.train.continual.posterior import GaussianPosterior, divergence


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a posterior is found. Construction raises InputError for values out of range."""

    kl_weight: float | Literal["elbo"] = 1.0
    warm_start: bool = True
    epochs: int = 10
    steps: int | None = None  # optimiser steps in place of epochs
    lr: float = 1e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        weight = self.kl_weight
        if isinstance(weight, str):
            if weight != "elbo":
                raise InputError(f'kl_weight = {weight!r}: give a number, or "elbo" for B / N')
        elif not (isfinite(weight) and weight >= 0):
            raise InputError(f"kl_weight = {weight!r}: give a number from 0 up, or 'elbo'")
        for name in ("epochs", "batch_size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} = {value!r}: give at least 1")
        if not (isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr = {self.lr!r}: give a number above 0")

    def total(self, count: int) -> int:
        """Return the optimiser steps over `count` examples."""
        return self.steps or self.epochs * ceil(count / self.batch_size)

    def weight(self, batch: int, count: int) -> float:
        """Return what the KL is multiplied by in a step."""
        return batch / count if self.kl_weight == "elbo" else float(self.kl_weight)

    def over_elbo(self, count: int) -> float:
        """Return how often the KL counts for each time that the evidence bound would count it."""
        return self.weight(min(self.batch_size, count), count) * count / min(self.batch_size, count)


class Fitted(NamedTuple):
    """A posterior, the optimiser steps it took, and the loss of its last step."""

    posterior: GaussianPosterior
    steps: int
    loss: float


def centred(network: Network, std: float) -> GaussianPosterior:
    """Return N(0, std^2) for every weight. Raises InputError unless std is a number above 0."""
    if not (isfinite(std) and std > 0):
        raise InputError(f"prior standard deviation {std!r}: give a number above 0")
    return GaussianPosterior(
        {name: torch.zeros(shape) for name, shape in network.shapes.items()},
        {name: torch.full(shape, float(std)) for name, shape in network.shapes.items()},
    )


def fit(
    network: Network,
    prior: GaussianPosterior,
    data: Labelled,
    how: Inference,
    rng: Generator,
    *,
    task: str,
    importance: Float[Tensor, " b"] | None = None,
) -> Fitted:
    """Return the posterior of a prior and data; `importance` multiplies each example's loss.

    Raises NonFiniteError, naming task and step, as soon as the loss is no number.
    """
    before, spread = network.flat(prior.mu), network.flat(prior.sigma)
    mu = before.clone() if how.warm_start else torch.zeros_like(before)
    rho = spread.log() if how.warm_start else torch.zeros_like(before)
    leaves = [mu.requires_grad_(), rho.requires_grad_()]
    optimiser = torch.optim.Adam(leaves, lr=how.lr, fused=True)
    x, y = data.x.to(network.device, torch.float32), data.y.to(network.device)
    weights = None if importance is None else importance.to(network.device)
    count, total, loss = len(y), how.total(len(y)), 0.0
    for step, rows in enumerate(batches(count, how.batch_size, total, rng)):
        rows = rows.to(network.device)
        sigma = rho.exp()
        noise = torch.randn(len(mu), generator=rng).to(network.device)
        losses = network.losses(network.named(mu + sigma * noise), x[rows], y[rows])
        if weights is not None:
            losses = losses * weights[rows]
        drift = divergence(mu, sigma, before, spread)
        objective = how.weight(len(rows), count) * drift + losses.sum()
        loss = float(objective.detach())
        if not isfinite(loss):
            raise NonFiniteError(
                f"{task}: the loss became {loss} at step {step + 1} of {total}; the usual cause is "
                f"a wide prior (here up to {float(spread.max()):.3g}) or a large learning rate "
                f"(here {how.lr:g}): lower one of them. What was learned before is unchanged"
            )
        optimiser.zero_grad(set_to_none=True)
        objective.backward()
        optimiser.step()
    found = GaussianPosterior(network.kept(mu), network.kept(rho.exp()))
    return Fitted(found, total, loss)

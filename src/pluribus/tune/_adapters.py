"""Adapters on the features of a few shots, trained on top of a tuned model.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, section 4.2.

    Tip      outputs + alpha exp(-beta (1 - h F')) Y          h (b, d), F (k, d), Y (k, v) one-hot
    LP++     h W' + b + alpha_c outputs                       W (v, d), alpha_c and b (v,)

Tip: Zhang et al., https://arxiv.org/abs/2111.03930: the shots' features F are keys, and train, as
do alpha and beta. LP++: Huang et al., https://arxiv.org/abs/2404.02285: W starts as each class's
sum of features, b at 0 and alpha_c, a factor for each class, at 1. h and F have length 1 in both
(for LP++ ours). Cross-entropy, AdamW, 10 epochs; a set of fewer than 10 batches is repeated, see
`Examples`. The authors' code evaluates both adapters as they start; here they are trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from pluribus.core.errors import InputError, MismatchError
from pluribus.core.merger import NonNegative, Positive, PositiveInt, _checked
from pluribus.tune._examples import Examples

State = dict[str, Tensor]
Rule = Callable[[State, Tensor, Tensor], Tensor]


class Shots(NamedTuple):
    """A model's features (b, d) and outputs (b, v) for labelled inputs, and the labels (b,)."""

    features: Tensor
    outputs: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter: called on features (b, d) and outputs (b, v), it returns scores (b, v)."""

    rule: Rule
    state: State
    losses: Sequence[float] = field(default=(), repr=False)  # of each step
    kept_epoch: int | None = None  # 0 is the start; None: the last, without validation

    def __call__(self, features: Tensor, outputs: Tensor) -> Tensor:
        """Return the adapted scores."""
        with torch.no_grad():
            return self.rule(self.state, features, outputs)

    def accuracy(self, shots: Shots) -> float:
        """Return the share of inputs that are named right."""
        named = self(shots.features, shots.outputs).argmax(1)
        return float((named == shots.labels).double().mean())


def tip(state: State, features: Tensor, outputs: Tensor) -> Tensor:
    """Return outputs + alpha exp(-beta (1 - h F')) Y."""
    near = normalize(features) @ normalize(state["keys"]).t()  # (b, k)
    return outputs + state["alpha"] * (-state["beta"] * (1 - near)).exp() @ state["values"]


def lp_plus_plus(state: State, features: Tensor, outputs: Tensor) -> Tensor:
    """Return h W' + b + alpha_c outputs."""
    linear = normalize(features) @ state["weight"].t() + state["bias"]
    return linear + state["alpha"] * outputs


@dataclass(frozen=True, kw_only=True)
class Tip:
    """A cache of the shots: what is near a shot is more probably of its class."""

    alpha: float = 2.0  # at the start
    beta: Positive = 1.0  # at the start
    lr: Positive = 1e-3
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 128
    fewest_batches: int = 10
    weight_decay: NonNegative = 0.01
    seed: int = 0

    def start(self, shots: Shots) -> Adapter:
        """Return the untrained adapter."""
        _check(shots)
        values = one_hot(shots.labels, shots.outputs.shape[1]).to(shots.outputs.dtype)
        alpha, beta = (shots.outputs.new_tensor(value) for value in (self.alpha, self.beta))
        keys = normalize(shots.features.detach())
        return Adapter(tip, {"keys": keys, "alpha": alpha, "beta": beta, "values": values})

    def fit(self, shots: Shots, validation: Shots | None = None) -> Adapter:
        """Train keys, alpha and beta; with `validation` the best epoch is kept, the start's too.

        Raises InputError or MismatchError for shots that don't fit together.
        """
        return _trained(self, self.start(shots), shots, validation, fixed=("values",))


@dataclass(frozen=True, kw_only=True)
class LpPlusPlus:
    """A linear probe that learns for each class how much to trust the model's own score."""

    lr: Positive = 1e-3
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 128
    fewest_batches: int = 10
    weight_decay: NonNegative = 0.01
    seed: int = 0

    def start(self, shots: Shots) -> Adapter:
        """Return the untrained adapter."""
        _check(shots)
        classes, width = shots.outputs.shape[1], shots.features.shape[1]
        weight = shots.features.new_zeros(classes, width)
        weight.index_add_(0, shots.labels, normalize(shots.features.detach()))
        bias, alpha = weight.new_zeros(classes), weight.new_ones(classes)
        return Adapter(lp_plus_plus, {"weight": weight, "bias": bias, "alpha": alpha})

    def fit(self, shots: Shots, validation: Shots | None = None) -> Adapter:
        """Train W, b and alpha_c; with `validation` the best epoch is kept, the start's too.

        Raises InputError or MismatchError for shots that don't fit together.
        """
        return _trained(self, self.start(shots), shots, validation)


_checked(Tip, "tip")
_checked(LpPlusPlus, "lp++")


def _check(shots: Shots) -> None:
    features, outputs, labels = shots
    if features.ndim != 2 or outputs.ndim != 2 or labels.ndim != 1:
        raise InputError(
            f"an adapter takes features (b, d), outputs (b, v) and labels (b,), not "
            f"{list(features.shape)}, {list(outputs.shape)} and {list(labels.shape)}"
        )
    if not len(features) == len(outputs) == len(labels):
        raise MismatchError(
            f"{len(features)} features, {len(outputs)} outputs and {len(labels)} labels: give one "
            "of each for every shot"
        )
    if not len(labels):
        raise InputError("an adapter needs at least one shot")
    if int(labels.min()) < 0 or int(labels.max()) >= outputs.shape[1]:
        raise InputError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but there are "
            f"{outputs.shape[1]} classes"
        )


def _trained(
    method: Tip | LpPlusPlus,
    start: Adapter,
    shots: Shots,
    validation: Shots | None,
    fixed: Sequence[str] = (),
) -> Adapter:
    state = {name: tensor.clone() for name, tensor in start.state.items()}
    learned = [state[name].requires_grad_() for name in state if name not in fixed]
    optimiser = torch.optim.AdamW(learned, lr=method.lr, weight_decay=method.weight_decay)
    examples = Examples(
        {"features": shots.features.detach(), "outputs": shots.outputs.detach()},
        shots.labels,
        batch_size=method.batch_size,
        seed=method.seed,
        fewest=method.fewest_batches,
        name="adapter",
    )
    losses: list[float] = []
    best, kept = start, None
    if validation is not None:
        _check(validation)
        bar, kept = start.accuracy(validation), 0
    for epoch in range(1, method.epochs + 1):
        for inputs, labels in examples:
            loss = cross_entropy(start.rule(state, inputs["features"], inputs["outputs"]), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        now = Adapter(start.rule, {name: tensor.detach().clone() for name, tensor in state.items()})
        if validation is None:
            best = now
        elif (score := now.accuracy(validation)) > bar:
            best, bar, kept = now, score, epoch
    return Adapter(best.rule, best.state, tuple(losses), kept)

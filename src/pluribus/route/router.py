"""Routers: features of an input (b, d) to weights of the parts (b, t), columns by name.

    mlp        softmax(g(h) / temperature), g: Linear - BatchNorm - LeakyReLU - Dropout, twice, and
               a Linear; `hidden` wide, 2 d by default, as Twin-Merging's router is
               (arXiv:2406.15479); its size grows with the square of that
    linear     softmax((W h + c) / temperature)
    centroids  softmax(cos(h, mean features of each task) / temperature): no training

Learned from features and which task they came from; no label of a task is needed. `fit` trains on
`train`, keeps the best epoch by accuracy on `val` (the authors choose on test data) and calibrates
one temperature on `val` by likelihood (Guo et al., ICML 2017, arXiv:1706.04599). Features are
standardised by `train` first.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.shapes import Float

Kind = Literal["mlp", "linear", "centroids"]


@runtime_checkable
class Router(Protocol):
    """Anything that gives weights, one column for each of `names`."""

    @property
    def names(self) -> Sequence[str]:
        """The parts, in the order of the columns."""
        ...

    def __call__(self, features: Float[Tensor, "b d"], /) -> Float[Tensor, "b t"]:
        """Return the weights of the parts for each row."""
        ...


class Gate(nn.Module):
    """A router made here: standardise, score, softmax.

    `hidden` is the width of an mlp, twice that of the features by default. Raises InputError for it
    beside another kind, MismatchError for features of another width, NonFiniteError for features or
    scores that are not finite (with `uniform_on_nan`, such rows get equal weights instead).
    """

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        kind: Kind = "mlp",
        *,
        hidden: int | None = None,
        dropout: float = 0.5,
        uniform_on_nan: bool = False,
    ) -> None:
        super().__init__()
        if hidden is not None and (kind != "mlp" or hidden < 1):
            raise InputError(
                f"hidden is {hidden} for router {kind!r}; it is the width of an mlp, 1 or more"
            )
        if len(set(names)) < len(names) or not names:
            raise InputError(f"a router needs different names of parts, not {list(names)}")
        self.names, self.kind, self.width = tuple(names), kind, width
        self.uniform_on_nan = uniform_on_nan
        count = len(self.names)
        self.hidden = hidden or 2 * width
        if kind == "mlp":
            hidden = self.hidden
            self.score: nn.Module = nn.Sequential(
                *_layer(width, hidden, dropout),
                *_layer(hidden, hidden, dropout),
                nn.Linear(hidden, count),
            )
        elif kind == "linear":
            self.score = nn.Linear(width, count)
        elif kind == "centroids":
            self.score = Centroids(width, count)
        else:
            raise InputError(f"router {kind!r}: expected mlp, linear or centroids")
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("temperature", torch.ones(()))
        self.mean: Tensor
        self.spread: Tensor
        self.temperature: Tensor

    def logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b t"]:
        """Return the scores before temperature and softmax."""
        if features.ndim != 2 or features.shape[1] != self.width:
            raise MismatchError(
                f"the router takes features (b, {self.width}), not {list(features.shape)}; it was "
                "fitted to another model or other features"
            )
        return self.score((features.to(self.mean.dtype) - self.mean) / self.spread)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b t"]:
        """Return the weights; each row sums to 1."""
        scores = self.logits(features) / self.temperature
        broken = ~scores.detach().isfinite().all(1)
        if bool(broken.any()):
            if not self.uniform_on_nan:
                raise NonFiniteError(
                    f"the router's scores of row {int(broken.nonzero()[0])} are not finite; look "
                    "at the inputs, or build the router with uniform_on_nan=True"
                )
            scores = torch.where(broken[:, None], torch.zeros_like(scores), scores)
        return scores.softmax(1)

    def settings(self) -> dict[str, Any]:
        """Return what makes an equal, unfitted router: `Gate(**settings)`."""
        own = {"hidden": self.hidden} if self.kind == "mlp" else {}
        return {
            "names": list(self.names),
            "width": self.width,
            "kind": self.kind,
            "uniform_on_nan": self.uniform_on_nan,
            **own,
        }


class Centroids(nn.Module):
    """Cosine to a mean direction for each part."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(count, width))
        self.centres: Tensor

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b t"]:
        """Return the cosines."""
        return F.normalize(x, dim=1) @ F.normalize(self.centres, dim=1).t()


def _layer(inputs: int, outputs: int, dropout: float) -> list[nn.Module]:
    return [
        nn.Linear(inputs, outputs),
        nn.BatchNorm1d(outputs),
        nn.LeakyReLU(0.01),
        nn.Dropout(dropout),
    ]


@dataclass(frozen=True)
class RouterReport:
    """How well a router knows where inputs come from, on inputs that it was not trained on."""

    accuracy: float
    entropy: float  # of the weights, in nats, mean over inputs
    loss: float  # cross-entropy, in nats, with the calibrated temperature
    calibration: float  # expected calibration error, ten bins
    temperature: float
    confusion: dict[str, dict[str, int]]  # true task -> chosen part -> inputs
    epoch: int = 0  # of those trained, that was kept
    history: list[float] = field(default_factory=list)  # accuracy on `val` by epoch


def fit(
    features: Mapping[str, Float[Tensor, "b d"]],
    val: Mapping[str, Float[Tensor, "b d"]] | None = None,
    *,
    kind: Kind = "mlp",
    hidden: int | None = None,
    epochs: int = 50,
    lr: float = 5e-4,
    batch_size: int = 1024,
    dropout: float = 0.5,
    calibrate: bool = True,
    uniform_on_nan: bool = False,
    seed: int = 0,
) -> tuple[Gate, RouterReport]:
    """Fit a router to features by task; a fifth of each is kept for validation if none is given.

    AdamW without weight decay, the rate falling linearly to 0, as the authors train. Raises
    InputError for fewer than two tasks or inputs a task or an impossible `hidden`, MismatchError
    for features of different widths, NonFiniteError for features that are not finite.
    """
    names = list(features)
    if kind == "mlp" and batch_size < 2:
        raise InputError(
            f"batch_size is {batch_size}; a batch norm learns from two inputs at least, so give 2 "
            "or more, or kind linear"
        )
    if len(names) < 2:
        raise InputError(f"a router chooses among tasks; {len(names)} was given")
    _check(features)
    rng = torch.Generator().manual_seed(seed)
    if val is None:
        features, val = _dealt(features, rng)
    elif sorted(val) != sorted(names):
        raise MismatchError(f"validation features are for {sorted(val)}, training for {names}")
    else:
        _check(val)
    x, y = _stacked(features, names)
    seen, true = _stacked(val, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(
            names,
            x.shape[1],
            kind,
            hidden=hidden,
            dropout=dropout,
            uniform_on_nan=uniform_on_nan,
        )
        gate.mean.copy_(x.mean(0))
        gate.spread.copy_(x.std(0).clamp(min=1e-6))
        if isinstance(gate.score, Centroids):
            normal = (x - gate.mean) / gate.spread
            means = [F.normalize(normal[y == t], dim=1).mean(0) for t in range(len(names))]
            gate.score.centres.copy_(torch.stack(means))
            history, best = [], 0
        else:
            history, best = _trained(gate, x, y, seen, true, epochs, lr, batch_size, rng)
    gate.eval().requires_grad_(False)
    if calibrate:
        gate.temperature.copy_(_temperature(gate.logits(seen), true))
    return gate, report(gate, val, epoch=best, history=history)


def _trained(
    gate: Gate,
    x: Tensor,
    y: Tensor,
    seen: Tensor,
    true: Tensor,
    epochs: int,
    lr: float,
    batch_size: int,
    rng: torch.Generator,
) -> tuple[list[float], int]:
    optimiser = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    # The last batch takes up what is left: a batch norm cannot learn from one row.
    per_epoch = max(1, len(x) // batch_size)
    total = epochs * per_epoch
    history: list[float] = []
    best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})
    step = 0
    for epoch in range(1, epochs + 1):
        gate.train()
        for rows in torch.randperm(len(x), generator=rng).tensor_split(per_epoch):
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 - step / total)
            loss = F.cross_entropy(gate.logits(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
        gate.eval()
        with torch.no_grad():
            right = float((gate.logits(seen).argmax(1) == true).double().mean())
        history.append(right)
        if right > best[0]:
            best = (right, epoch, copy.deepcopy(gate.state_dict()))
    gate.load_state_dict(best[2])
    return history, best[1]


def report(
    gate: Gate,
    features: Mapping[str, Float[Tensor, "b d"]],
    *,
    epoch: int = 0,
    history: Sequence[float] = (),
) -> RouterReport:
    """Measure a router on features by task; tasks that it does not know are an error."""
    if unknown := [name for name in features if name not in gate.names]:
        raise InputError(f"the router has no part {unknown[0]!r}; parts: {', '.join(gate.names)}")
    x, y = _stacked(features, gate.names)
    with torch.no_grad():
        weights = gate(x)
    sure, chosen = weights.max(1)
    confusion = {
        task: {
            part: int(((y == gate.names.index(task)) & (chosen == p)).sum())
            for p, part in enumerate(gate.names)
        }
        for task in features
    }
    right = (chosen == y).double()
    error = 0.0
    for low in range(10):
        inside = (sure > low / 10) & (sure <= (low + 1) / 10)
        if bool(inside.any()):
            gap = float((right[inside].mean() - sure[inside].double().mean()).abs())
            error += gap * float(inside.double().mean())
    chances = weights.clamp(min=1e-12)
    return RouterReport(
        accuracy=float(right.mean()),
        entropy=float(-(chances * chances.log()).sum(1).mean()),
        loss=float(-chances.gather(1, y[:, None]).log().mean()),
        calibration=error,
        temperature=float(gate.temperature),
        confusion=confusion,
        epoch=epoch,
        history=list(history),
    )


def strangeness(gate: Gate, features: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return how unlike the known tasks inputs are: minus the log-sum-exp of their scores.

    Liu et al., NeurIPS 2020 (arXiv:2010.03759), the energy score; larger is stranger.
    """
    with torch.no_grad():
        return -torch.logsumexp(gate.logits(features) / gate.temperature, 1)


def auroc(known: Float[Tensor, " a"], strange: Float[Tensor, " b"]) -> float:
    """Return the chance that a strange input's score is above a known one's; ties count half."""
    if not len(known) or not len(strange):
        raise InputError("both kinds of inputs need at least one")
    order = torch.cat([known, strange]).double()
    values, place = order.unique(return_inverse=True)
    counts = torch.bincount(place, minlength=len(values)).double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]
    total = float(ranks[len(known) :].sum()) - len(strange) * (len(strange) + 1) / 2
    return total / (len(known) * len(strange))


def _temperature(logits: Tensor, true: Tensor) -> Tensor:
    """Return the temperature with the best likelihood, between 0.01 and 100."""
    low, high = math.log(0.01), math.log(100.0)
    golden = (math.sqrt(5) - 1) / 2

    def loss(log: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log), true))

    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return torch.tensor(math.exp((low + high) / 2))


def _check(features: Mapping[str, Tensor]) -> None:
    widths = {name: tuple(x.shape[1:]) for name, x in features.items()}
    if len(set(widths.values())) > 1:
        raise MismatchError(f"features have different widths: {widths}")
    for name, x in features.items():
        if x.ndim != 2:
            raise MismatchError(f"features of {name} are {list(x.shape)}, expected (b, d)")
        if len(x) < 2:
            raise InputError(f"task {name} has {len(x)} input; a router needs at least two of each")
        if not bool(x.isfinite().all()):
            raise NonFiniteError(f"features of task {name} are not finite; look at its inputs")


def _dealt(
    features: Mapping[str, Tensor], rng: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    train, val = {}, {}
    for name, x in features.items():
        order = torch.randperm(len(x), generator=rng)
        held = max(1, len(x) // 5)
        val[name], train[name] = x[order[:held]], x[order[held:]]
    return train, val


def _stacked(features: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    x = torch.cat([features[name].float() for name in names if name in features])
    y = torch.cat(
        [
            torch.full((len(features[name]),), number)
            for number, name in enumerate(names)
            if name in features
        ]
    )
    return x.clone(), y

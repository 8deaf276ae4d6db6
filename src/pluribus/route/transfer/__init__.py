"""ScaLearn: learn how much of each source task's adapter helps a target with few labels.

Frohmann et al., Findings of ACL 2024, https://arxiv.org/abs/2310.01217. Base and sources stay
frozen; at every layer the target adds sum_s omega_s * u_s(x), u_s without its residual, and trains
omega and a head of its own:

    variant                                   omega      L = 12, d = 768, n = 8    dropout here
    ScaLearn()                                (L, n, d)  73,728 numbers            0.3
    ScaLearn(shape="scalar")                  (L, n, 1)  96                        0
    ScaLearn(scope="shared")                  (n, d)     6,144                     0.3
    ScaLearn(scope="shared", shape="scalar")  (n, 1)     8                         0

    omega ~ N(init_scale / n, init_std^2); neither normalised nor kept above 0

`AdapterFusion` (Pfeiffer et al., EACL 2021, arXiv:2005.00247) and `SingleAdapter` are what it is
compared with; the latter also makes the sources.

    reviews = fit(model, {}, data, 2, SingleAdapter(layers=r"blocks\\.\\d+\\.down")).export()
    result = fit(model, {"reviews": reviews, ...}, few, 5, ScaLearn())
    result.contributions()                       # which task helped, layer by layer
    result.export().save("tickets.safetensors", model)     # one ordinary adapter, exactly the same

Differs from the authors: the base runs without dropout; by default dropout is 0 where omega is
scalar, as p = 0.3 would drop whole sources (`dropout=0.3` is theirs); omega is keyed by source
name; AdapterFusion cools in training alone, so that the same inputs always score the same.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.errors import FormatError, InputError, MismatchError, listing, nearest
from pluribus.route._adapter_file import check_base, read
from pluribus.route._skills import write
from pluribus.route.adapters import AdapterSet, Placement
from pluribus.route.features import Features, features_of
from pluribus.route.store import digest
from pluribus.route.transfer._fit import (
    Data,
    Examples,
    Inputs,
    Learner,
    OnStep,
    Plan,
    Point,
    Score,
    Target,
    checked,
    headed,
    running,
)
from pluribus.route.transfer._methods import (
    METHODS,
    AdapterFusion,
    Method,
    ScaLearn,
    SingleAdapter,
    name_of,
    start,
)
from pluribus.route.transfer._mix import Alone, Fused, Mixer, Scaled, Sources
from pluribus.tasks.heads import Head
from pluribus.tasks.views import generator

__all__ = [
    "METHODS",
    "AdapterFusion",
    "Examples",
    "ScaLearn",
    "Score",
    "SingleAdapter",
    "Target",
    "TransferResult",
    "fit",
    "load",
]

FORMAT = "pluribus transfer 1"


@dataclass(frozen=True, eq=False)
class TransferResult:
    """What a target learned, where its validation was best.

    `numbers` counts what was trained beside the head; `step` is the one that was kept, `val` and
    `test` its scores, `history` all validations.
    """

    method: Method
    sources: tuple[str, ...]
    paths: tuple[str, ...]
    placement: Placement
    mixer: Mixer = field(repr=False)
    head: Head = field(repr=False)
    features: Features | str = field(repr=False)
    numbers: int
    step: int
    val: Score | None
    test: Score | None
    history: tuple[Point, ...] = field(repr=False)
    digests: Mapping[str, str] = field(repr=False)  # of base ("") and sources

    @property
    def omega(self) -> dict[str, Tensor]:
        """Scales by source name: (L, d) or (L, 1), shared by layers (d,) or (1,), as trained.

        Raises InputError for a method that has none.
        """
        if not isinstance(self.mixer, Scaled):
            raise InputError(f"{type(self.method).__name__} has no omega; ScaLearn() has")
        return dict(zip(self.sources, self.mixer.omega.detach().unbind(-2), strict=True))

    def contributions(self) -> dict[str, dict[str, float]]:
        """Return, by source and layer, the mean of omega as the layer uses it.

        Of AdapterFusion, the mean attention on the validation (or else training) inputs; of a
        single adapter, nothing.
        """
        if isinstance(self.mixer, Alone):
            return {}
        table = torch.stack([self._shares(i) for i in range(len(self.paths))])  # (L, n)
        return {
            name: dict(zip(self.paths, column, strict=True))
            for name, column in zip(self.sources, table.t().tolist(), strict=True)
        }

    def _shares(self, layer: int) -> Tensor:
        if isinstance(self.mixer, Scaled):
            return self.mixer.scales(layer).mean(-1)
        assert isinstance(self.mixer, Fused)
        seen = self.mixer.get_buffer("attention")[layer]
        return seen / seen.sum()

    def export(self) -> AdapterSet:
        """Return the one adapter that the result comes to, exactly: an ordinary source or part.

        Raises InputError for AdapterFusion, whose mixture depends on the input.
        """
        if isinstance(self.mixer, Fused):
            raise InputError(
                "AdapterFusion mixes its sources anew for every token, so no one adapter equals "
                "it; save the result itself, or use ScaLearn()"
            )
        with torch.no_grad():
            layers = {path: self.mixer.folded(i) for i, path in enumerate(self.paths)}
        return AdapterSet(layers, self.placement)

    def logits(self, model: nn.Module, x: Inputs) -> Tensor:
        """Return the class scores (b, v) of the target's head over the model with the result."""
        learner = Learner(model, self.mixer, features_of(self.features), "", self.head)
        with torch.no_grad(), running(model, self.mixer, self.paths, self.placement):
            return learner.logits(x)

    def report(self) -> dict[str, Any]:
        """Return what was done and found, as plain values."""
        return {**self._told(), "contributions": self.contributions()}

    def _told(self) -> dict[str, Any]:
        return {
            "method": {"name": name_of(self.method), **asdict(self.method)},
            "sources": list(self.sources),
            "layers": list(self.paths),
            "placement": self.placement,
            "numbers": self.numbers,
            "step": self.step,
            "val": None if self.val is None else self.val._asdict(),
            "test": None if self.test is None else self.test._asdict(),
        }

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write what was learned, without the sources: see `load`. Raises OutputError, InputError.

        Features that are a function of your own have no name to be saved by.
        """
        name = getattr(self.features, "name", self.features)
        if not isinstance(name, str):
            raise InputError("features that are a function of your own cannot be saved; name some")
        tensors = {f"mixer/{n}": t for n, t in self.mixer.state_dict().items()}
        tensors |= {f"head/{n}": t for n, t in self.head.items()}
        table = {
            "format": FORMAT,
            **self._told(),
            "features": name,
            "digests": dict(self.digests),
        }
        write(Path(path), table, tensors, overwrite=overwrite)


def fit(
    model: nn.Module,
    adapters: Sources,
    data: Data,
    head: int | nn.Linear | Head,
    method: Method | None = None,
    *,
    features: Features | str = "output",
    epochs: int = 30,
    steps: int | None = None,
    batch_size: int = 32,
    lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    patience: int | None = None,
    checks: int = 30,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> TransferResult:
    """Learn a target with the help of source adapters (`{}` for a single adapter without any).

    `data` has `train` and, for choosing the step, `val`, and `test`: inputs and class indices.
    Inputs are a tensor, or tensors by the names of the model's keywords. `head` is a number of
    classes (a head that starts at 0), or a head to start from, which is copied; it stands behind
    the model's `features` (see `pluribus.route.features`). `steps` instead of `epochs` suit few
    examples. `lr` is the method's own by default, `head_lr` the same; both fall linearly to 0.
    Validation is after every epoch, at most `checks` times; it stops after `patience` of them
    without a better one. `on_step(method, done, total)` is told of every step.

    Raises InputError for settings out of range or sources that would train, MismatchError for
    sources, head, labels or inputs that do not fit, NonFiniteError for a loss that is none.
    """
    method = ScaLearn() if method is None else method
    lr = method.lr if lr is None else lr
    plan = Plan(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        head_lr=lr if head_lr is None else head_lr,
        weight_decay=weight_decay,
        patience=patience,
        checks=checks,
        seed=seed,
    )
    pairs = list(adapters.items()) if isinstance(adapters, Mapping) else list(adapters)
    device = next(model.parameters()).device
    rng = generator(seed, name_of(method), "transfer/start")
    began = start(method, [(name, one.to(device)) for name, one in pairs], model, rng)
    mixer = began.mixer.to(device)
    before = {"": digest(model), **{name: one.digest for name, one in pairs}}
    learner = Learner(model, mixer, features_of(features), name_of(method), {})
    splits = {
        name: Examples(*found)
        for name in ("train", "val", "test")
        if (found := getattr(data, name, None)) is not None
    }
    with running(model, mixer, began.paths, began.placement) as attached:
        checked(splits)
        learner.head = headed(head, learner.width(attached, splits["train"]), device)
        checked(splits, len(learner.head["weight"]))
        batches = generator(seed, "batches", "transfer/batches")  # the same for every method
        kept, history = learner.learn(splits, plan, batches, on_step)
        val = learner.score(splits["val"]) if "val" in splits else None
        if isinstance(mixer, Fused) and val is None:
            learner.score(splits["train"])
        seen = mixer.get_buffer("attention").clone() if isinstance(mixer, Fused) else None
        test = learner.score(splits["test"]) if "test" in splits else None
    if isinstance(mixer, Fused) and seen is not None:
        mixer.get_buffer("attention").copy_(seen)
    for name, one in [("", model), *pairs]:
        if before[name] != (digest(one) if isinstance(one, nn.Module) else one.digest):
            raise MismatchError(
                f"{f'source {name}' if name else 'the model'} was changed during training; what "
                "was learned is for tensors that are gone"
            )
    return TransferResult(
        method,
        tuple(name for name, _ in pairs),
        began.paths,
        began.placement,
        mixer.eval(),
        learner.head,
        features,
        sum(p.numel() for p in mixer.parameters()),
        kept,
        val,
        test,
        tuple(history),
        before,
    )


def load(path: str | os.PathLike[str], model: nn.Module, adapters: Sources = ()) -> TransferResult:
    """Read what `TransferResult.save` wrote, for the same model and sources in any order.

    Raises MissingError, FormatError, or MismatchError for another model, other sources, or tensors
    of another shape.
    """
    path = Path(path)
    keys = ("method", "sources", "layers", "placement", "numbers", "step", "val", "test")
    table, tensors = read(path, FORMAT, (*keys, "features", "digests"))
    check_base(path, table["digests"].get("", ""), model)
    given = dict(adapters.items() if isinstance(adapters, Mapping) else adapters)
    if lacking := [name for name in table["sources"] if name not in given]:
        raise MismatchError(
            f"{path}: was learned with the source {lacking[0]}, which is not given; there are: "
            f"{listing(given) or 'none'}.{nearest(lacking[0], given)}"
        )
    for name in table["sources"]:
        if given[name].digest != table["digests"].get(name):
            raise MismatchError(f"{path}: source {name} has other tensors than the one it was then")
    told = dict(table["method"])
    kind = type(METHODS.get(told.pop("name"), None))
    try:
        method: Any = kind(**told)
    except (TypeError, InputError) as error:
        raise FormatError(f"{path}: its method is none of ours ({error})") from None
    device = next(model.parameters()).device
    pairs = [(name, given[name].to(device)) for name in table["sources"]]
    rng = generator(0, "load", "transfer/start")
    began = start(method, pairs, model, rng)
    state = {n.removeprefix("mixer/"): t for n, t in tensors.items() if n.startswith("mixer/")}
    own = began.mixer.state_dict()
    for name in {**own, **state}:
        told_shape, wanted = (list(x[name].shape) if name in x else None for x in (state, own))
        if told_shape != wanted:
            raise MismatchError(
                f"{path}: {name} is {told_shape or 'not there'}, but {wanted or 'not there'} for "
                f"{len(pairs)} sources at {len(began.paths)} layers"
            )
    began.mixer.load_state_dict(state)
    if not {"head/weight", "head/bias"} <= set(tensors):
        raise FormatError(f"{path}: holds no head; it is not whole")
    return TransferResult(
        method,
        tuple(table["sources"]),
        began.paths,
        began.placement,
        began.mixer.eval().requires_grad_(False).to(device),
        {name: tensors[f"head/{name}"].to(device) for name in ("weight", "bias")},
        table["features"],
        table["numbers"],
        table["step"],
        table["val"] and Score(**table["val"]),
        table["test"] and Score(**table["test"]),
        (),
        table["digests"],
    )

"""Ways to learn a target: their settings, what they count, and what they start from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Generator, nn

from pluribus.core.errors import InputError
from pluribus.route.adapters import BottleneckAdapter, Placement, sites
from pluribus.route.parts import Activation
from pluribus.route.transfer._mix import (
    Alone,
    Fused,
    Mixer,
    Normalise,
    Scaled,
    Sources,
    Stack,
    stacked,
)


@dataclass(frozen=True, kw_only=True)
class ScaLearn:
    """Scales of frozen sources. Raises InputError for settings out of range.

    `dropout` zeroes entries of omega in training (None: 0.3 for vectors, 0 for scalars).
    `normalise` divides omega by its sum over sources, or takes their softmax (the paper's
    ablations). `regulariser` times sum (1 - omega)^2 is added to the loss, the mean over d of an
    omega by layer.
    """

    scope: Literal["layer", "shared"] = "layer"
    shape: Literal["vector", "scalar"] = "vector"
    init_scale: float = 2.0
    init_std: float = 1e-3
    dropout: float | None = None
    normalise: Normalise = "none"
    regulariser: float = 0.0
    lr: float = 6e-3

    def __post_init__(self) -> None:
        for name, known in (
            ("scope", ("layer", "shared")),
            ("shape", ("vector", "scalar")),
            ("normalise", get_args(Normalise)),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} {getattr(self, name)!r}; expected one of {', '.join(known)}"
                )
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(
                f"dropout is {self.dropout}; it must be at least 0 and below 1, or nothing is left"
            )
        for name in ("init_scale", "init_std", "regulariser"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name != "init_scale" and value < 0):
                raise InputError(f"{name} is {value}; it must be finite, and not below 0")

    def mixer(self, stack: Stack, rng: Generator) -> Scaled:
        """Return what stands at the layers, at the start."""
        usual = 0.3 if self.shape == "vector" else 0.0
        return Scaled(
            stack,
            shared=self.scope == "shared",
            vector=self.shape == "vector",
            init=self.init_scale / len(stack.names),
            std=self.init_std,
            dropout=usual if self.dropout is None else self.dropout,
            normalise=self.normalise,
            regulariser=self.regulariser,
            generator=rng,
        )


@dataclass(frozen=True, kw_only=True)
class AdapterFusion:
    """Attention over the sources, 3 d^2 + 2 d numbers a layer.

    The temperature falls by `cooling` at each training forward, down to 1. Raises InputError for a
    temperature below 1.
    """

    temperature: float = 50.0
    cooling: float = 0.05
    lr: float = 5e-5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 1 and self.cooling >= 0):
            raise InputError(
                f"temperature is {self.temperature} and cooling {self.cooling}; they must be at "
                "least 1 and 0"
            )

    def mixer(self, stack: Stack, rng: Generator) -> Fused:
        """Return what stands at the layers, at the start."""
        return Fused(stack, temperature=self.temperature, cooling=self.cooling, generator=rng)


@dataclass(frozen=True, kw_only=True)
class SingleAdapter:
    """An adapter of the target alone: the baseline, and how sources are made.

    `layers` is a regular expression for whole module names; without it, they are the sources'. So
    are placement and bottleneck (the widest of them).
    """

    layers: str | None = None
    bottleneck: int | None = None
    placement: Placement | None = None
    activation: Activation = "relu"
    lr: float = 3e-4

    def mixer(self, found: Mapping[str, int], usual: int, rng: Generator) -> Alone:
        """Return what stands at the layers, at the start; `usual` is the bottleneck if unsaid."""
        size = usual if self.bottleneck is None else self.bottleneck
        return Alone(
            [
                BottleneckAdapter(width, size, self.activation, generator=rng)
                for width in found.values()
            ]
        )


Method = ScaLearn | AdapterFusion | SingleAdapter

METHODS: dict[str, Method] = {
    "scalearn": ScaLearn(),
    "scalearn_uniform": ScaLearn(shape="scalar"),
    "scalearn++": ScaLearn(scope="shared"),
    "scalearn_uniform++": ScaLearn(scope="shared", shape="scalar"),
    "adapter_fusion": AdapterFusion(),
    "single_adapter": SingleAdapter(),
}


class Start(NamedTuple):
    """What stands at the layers before training, and where."""

    mixer: Mixer
    paths: tuple[str, ...]
    placement: Placement


def start(method: Method, sources: Sources, model: nn.Module, rng: Generator) -> Start:
    """Return where a method starts. Raises InputError or MismatchError: see `stacked`, `sites`."""
    if isinstance(method, SingleAdapter) and (method.layers is not None or not sources):
        if method.layers is None:
            raise InputError(
                "a single adapter without sources stands nowhere; say where: "
                "SingleAdapter(layers=r'blocks\\.\\d+\\.down')"
            )
        found = sites(model, method.layers)
        usual = max(1, min(found.values()) // 16)
        mixer: Mixer = method.mixer(found, usual, rng)
        return Start(mixer, tuple(found), method.placement or "behind")
    stack = stacked(sources)
    if isinstance(method, SingleAdapter):
        found = dict.fromkeys(stack.paths, stack.width)
        widest = max(len(one.down) for layer in stack.layers for one in layer)
        mixer = method.mixer(found, widest, rng)
        return Start(mixer, stack.paths, method.placement or stack.placement)
    return Start(method.mixer(stack, rng), stack.paths, stack.placement)


def name_of(method: Method) -> str:
    """Return the name that recipes call a method by."""
    if isinstance(method, ScaLearn):
        shape = "_uniform" if method.shape == "scalar" else ""
        return f"scalearn{shape}{'++' if method.scope == 'shared' else ''}"
    return "adapter_fusion" if isinstance(method, AdapterFusion) else "single_adapter"

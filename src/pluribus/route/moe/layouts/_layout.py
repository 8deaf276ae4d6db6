"""What a layout is, and what several of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pluribus.core.source import Source
from pluribus.route.moe.sources import Joined

GIVEN = ("architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Facts:
    """What the choice among layouts goes by."""

    name: str
    bases: tuple[str, ...]  # model types of dense models that fit
    family: str  # the class in transformers is this + ForCausalLM
    titles: tuple[str, ...] = ()  # further names it goes by in recipes
    rank: int = 0  # the lowest that fits is taken


def layout(name: str, **facts: Any) -> Callable[[type], type]:
    """Register a class as the layout of its file's name."""

    def mark(cls: type) -> type:
        cls.__pluribus_layout__ = Facts(name, **facts)
        return cls

    return mark


class Mlp(NamedTuple):
    """The feed-forward block of one model in one layer: down(act(gate x) * up x)."""

    gate: Source  # (i, d)
    up: Source  # (i, d)
    down: Source  # (d, i)

    @property
    def width(self) -> int:
        """Inner width."""
        return self.gate.spec.shape[0]


class Sizes(NamedTuple):
    """How much of what a mixture has."""

    experts: int
    per_token: int
    shared: int


class Layer(NamedTuple):
    """What one layer's mixture is made of."""

    experts: Sequence[Mlp]
    gate: Source  # (t, d)
    shared: Sequence[Mlp] = ()
    shared_gate: Source | None = None  # (1, d)


class Layout(Protocol):
    """One architecture. The class carries `__pluribus_layout__`."""

    gated_shared: bool  # whether the shared expert has a gate of its own
    gate: str  # of the gate's tensor on disk, with {layer}
    router: str  # of the module that scores, in a layer

    def refusal(self, base: Mapping[str, Any], sizes: Sizes) -> str | None:
        """Return why a base's configuration or the sizes do not fit, or None."""
        ...

    def config(self, base: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return what the configuration says beside what it shares with the base's."""
        ...

    def notes(self, base: Mapping[str, Any]) -> list[str]:
        """Return what of the base the architecture cannot keep."""
        ...

    def tensors(self, layer: int, made: Layer) -> dict[str, Source]:
        """Return the tensors of one layer's mixture by their names on disk."""
        ...

    def added(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return tensors of zeros that the architecture wants and the base lacks, by shape."""
        ...


def each(prefix: str, experts: Sequence[Mlp], names: tuple[str, str, str]) -> dict[str, Source]:
    """Name experts one by one; `names` are those of gate, up and down."""
    return {
        f"{prefix}.{number}.{name}.weight": tensor
        for number, mlp in enumerate(experts)
        for name, tensor in zip(names, mlp, strict=True)
    }


def fused(experts: Sequence[Mlp]) -> tuple[Source, Source]:
    """Return gate over up (t, 2i, d) and down (t, d, i) of all experts."""
    wide, d = experts[0].gate.spec.shape
    both = [part for mlp in experts for part in (mlp.gate, mlp.up)]
    inputs = Joined(both, (len(experts), 2 * wide, d))
    return inputs, Joined([mlp.down for mlp in experts], (len(experts), d, wide))


def biases(
    shapes: Mapping[str, tuple[int, ...]], projections: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of attention biases that a model lacks."""
    found = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        bias = f"{module}.bias"
        weight = ".self_attn." in name and name.endswith(".weight")
        if weight and module.rpartition(".")[2] in projections and bias not in shapes:
            found[bias] = shape[:1]
    return found


def window(base: Mapping[str, Any]) -> bool:
    """Return whether any layer of a base attends to a window only."""
    kinds = base.get("layer_types")
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return bool(base.get("sliding_window")) and base.get("use_sliding_window", True)

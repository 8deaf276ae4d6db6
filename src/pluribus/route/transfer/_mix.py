"""What stands at each layer while a target learns: sources scaled, fused, or one adapter alone.

    scaled   sum_s omega_s * u_s(x)                                        ScaLearn
    fused    sum_s softmax_s(q . k_s / T) v_s,   q = W_q x + b_q, k_s = W_k u_s + b_k, v_s = W_v u_s

`Scaled` never makes the u_s: with h the sources' activated bottlenecks side by side,

    sum_s omega_s * (up_s h_s + b_s) = [diag(omega_s) up_s]_s h + sum_s omega_s * b_s

which is one adapter of all bottlenecks together; `folded` returns that one. `Fused` uses that the
keys' and values' maps are linear: q . (W_k u_s) = (W_k' q) . u_s, and sum_s p_s W_v u_s =
W_v sum_s p_s u_s, so each map is applied once and not once a source.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from pluribus.core.errors import InputError, MismatchError, listing
from pluribus.core.shapes import Float
from pluribus.route.adapters import INIT_STD, AdapterSet, BottleneckAdapter, Placement, added
from pluribus.route.parts import Activation, Bottleneck
from pluribus.route.store import FIELDS

Normalise = Literal["none", "mean", "softmax"]
Sources = Mapping[str, AdapterSet] | Sequence[tuple[str, AdapterSet]]


@dataclass(frozen=True, eq=False)
class Stack:
    """Sources that fit together, by layer and in the order they were given."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    placement: Placement
    width: int
    activation: Activation
    layers: tuple[tuple[Bottleneck, ...], ...]  # of each path, one a source


def stacked(sources: Sources) -> Stack:
    """Check that sources fit together.

    Raises InputError for none, a name twice or adapters that would train, MismatchError for other
    layers, widths, activations or placements.
    """
    pairs = list(sources.items()) if isinstance(sources, Mapping) else list(sources)
    names = [name for name, _ in pairs]
    if not pairs:
        raise InputError("there is no source adapter; give at least one, or train SingleAdapter()")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"source {twice[0]!r} is named twice; give each source its own name")
    first_name, first = pairs[0]
    for name, one in pairs:
        _check_fits(name, one, first_name, first)
    widths = {len(one.up_bias) for one in first.layers.values()}
    if len(widths) > 1:
        raise MismatchError(
            f"source {first_name}'s layers are {listing(map(str, sorted(widths)))} wide; transfer "
            "needs layers of one width: leave some out"
        )
    return Stack(
        tuple(names),
        tuple(first.layers),
        first.placement,
        widths.pop(),
        next(iter(first.layers.values())).activation,
        tuple(tuple(one.layers[path] for _, one in pairs) for path in first.layers),
    )


def _check_fits(name: str, one: AdapterSet, other: str, first: AdapterSet) -> None:
    beside = f"source {name}, unlike {other},"
    if one.placement != first.placement:
        raise MismatchError(
            f"{beside} is placed {one.placement}, not {first.placement}; all must be placed alike"
        )
    if set(one.layers) != set(first.layers):
        odd = sorted(set(one.layers) ^ set(first.layers))
        raise MismatchError(
            f"{beside} has {len(one.layers)} layers, not {len(first.layers)}; only one of them has "
            f"{listing(odd)}"
        )
    for path, adapter in one.layers.items():
        wanted, found = len(first.layers[path].up_bias), len(adapter.up_bias)
        if found != wanted:
            raise MismatchError(f"{beside} is {found} wide at {path}, not {wanted}")
        if adapter.activation != next(iter(first.layers.values())).activation:
            raise MismatchError(
                f"source {name} has the activation {adapter.activation} at {path}, {other} has "
                "another; sources that are folded into one share it"
            )
        for field in FIELDS["bottleneck"]:
            if getattr(adapter, field).requires_grad:
                raise InputError(
                    f"source {name} would train: {field} at {path} requires a gradient; sources "
                    "are frozen, give AdapterSet.of(...)"
                )


class Scaled(nn.Module):
    """Sources times omega: (L, n, d) or (L, n, 1) by layer, (n, d) or (n, 1) shared by layers."""

    def __init__(
        self,
        stack: Stack,
        *,
        shared: bool,
        vector: bool,
        init: float,
        std: float,
        dropout: float,
        normalise: Normalise,
        regulariser: float,
        generator: Generator,
    ) -> None:
        super().__init__()
        self.names = stack.names
        self.activation: Activation = stack.activation
        self.regulariser = regulariser
        self.shared, self.dropout, self.normalise = shared, dropout, normalise
        self.generator = generator
        shape = (len(stack.names), stack.width if vector else 1)
        shape = shape if shared else (len(stack.paths), *shape)
        self.omega = nn.Parameter(init + std * torch.randn(shape, generator=generator))
        self.ranks = [[len(one.down) for one in layer] for layer in stack.layers]
        for i, layer in enumerate(stack.layers):
            made = {
                "down": torch.cat([one.down for one in layer]),
                "down_bias": torch.cat([one.down_bias for one in layer]),
                "up": torch.cat([one.up for one in layer], dim=1),
                "up_bias": torch.stack([one.up_bias for one in layer]),
            }
            for name, tensor in made.items():  # the sources' own: no part of what is learned
                self.register_buffer(f"{name}_{i}", tensor, persistent=False)

    def scales(self, layer: int) -> Float[Tensor, "n w"]:
        """Return omega as one layer uses it now: dropped out in training, then normalised."""
        omega = self.omega if self.shared else self.omega[layer]
        if self.training and self.dropout:
            kept = torch.rand(omega.shape, generator=self.generator) >= self.dropout
            omega = omega * kept.to(omega) / (1 - self.dropout)
        if self.normalise == "mean":
            return omega / omega.sum(0, keepdim=True)
        return omega.softmax(0) if self.normalise == "softmax" else omega

    def folded(self, layer: int) -> Bottleneck:
        """Return the one adapter that all sources and their scales come to."""
        down, down_bias, up, up_bias = (
            self.get_buffer(f"{field}_{layer}") for field in FIELDS["bottleneck"]
        )
        omega = self.scales(layer)
        ranks = torch.tensor(self.ranks[layer], device=omega.device)
        spread = omega.repeat_interleave(ranks, dim=0, output_size=len(down)).t()  # (w, n r)
        return Bottleneck(down, down_bias, up * spread, (omega * up_bias).sum(0), self.activation)

    def forward(self, layer: int, x: Float[Tensor, "b *s d"]) -> Float[Tensor, "b *s d"]:
        """Return what is added at a layer."""
        return added(x, self.folded(layer))

    def penalty(self) -> Float[Tensor, ""]:
        """Return sum (1 - omega)^2, of omega by layer the mean over d."""
        square = (1 - self.omega).square()
        return square.sum() if self.shared else square.mean(-1).sum()


class Fused(nn.Module):
    """AdapterFusion: attention over the sources, at every token of every layer."""

    def __init__(
        self, stack: Stack, *, temperature: float, cooling: float, generator: Generator
    ) -> None:
        super().__init__()
        d, count = stack.width, len(stack.paths)
        self.names, self.layers, self.cooling = stack.names, stack.layers, cooling

        def drawn() -> nn.Parameter:
            return nn.Parameter(INIT_STD * torch.randn(d, d, generator=generator))

        value = torch.full((d, d), 1e-6).fill_diagonal_(1.0)
        self.query = nn.ParameterList(drawn() for _ in range(count))
        self.query_bias = nn.ParameterList(torch.zeros(d) for _ in range(count))
        self.key = nn.ParameterList(drawn() for _ in range(count))
        self.key_bias = nn.ParameterList(torch.zeros(d) for _ in range(count))
        self.value = nn.ParameterList(value.clone() for _ in range(count))
        self.register_buffer("temperature", torch.full((count,), float(temperature)))
        self.register_buffer("attention", torch.zeros(count, len(stack.names)))  # summed, in eval

    def forward(self, layer: int, x: Float[Tensor, "b *s d"]) -> Float[Tensor, "b *s d"]:
        """Return what is added at a layer; in training the layer cools by a step."""
        dtype, x = x.dtype, x.to(self.value[layer].dtype)
        ups = torch.stack([added(x, one) for one in self.layers[layer]], dim=-2)  # (b, ..., n, d)
        query = linear(x, self.query[layer], self.query_bias[layer])
        scores = (ups @ (query @ self.key[layer]).unsqueeze(-1)).squeeze(-1)  # (b, ..., n)
        scores = scores + (query * self.key_bias[layer]).sum(-1, keepdim=True)
        shares = (scores / self.get_buffer("temperature")[layer].clone()).softmax(-1)
        if self.training:
            with torch.no_grad():
                self.get_buffer("temperature")[layer].sub_(self.cooling).clamp_(min=1.0)
        else:
            self.get_buffer("attention")[layer].add_(shares.detach().flatten(0, -2).sum(0))
        return linear((shares.unsqueeze(-2) @ ups).squeeze(-2), self.value[layer]).to(dtype)


class Alone(nn.Module):
    """One new adapter at each layer."""

    def __init__(self, made: Sequence[BottleneckAdapter]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(made)

    def forward(self, layer: int, x: Float[Tensor, "b *s d"]) -> Float[Tensor, "b *s d"]:
        """Return what is added at a layer."""
        return self.adapters[layer](x)

    def folded(self, layer: int) -> Bottleneck:
        """Return the adapter of a layer."""
        return self.adapters[layer].part()  # type: ignore[operator]


Mixer = Scaled | Fused | Alone


def summands(mixer: Mixer, paths: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what `attach` takes: the mixer's layers by the modules they stand at."""

    def at(layer: int, path: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        return path, lambda x: mixer(layer, x)

    return dict(starmap(at, enumerate(paths)))

"""Bottleneck adapters behind the feed-forward outputs of any module, trained or taken over.

    u(x) = up act(down x + down_bias) + up_bias      x (b, ..., d); down (r, d), up (d, r)

    placement    at                    gives
    behind       any module, output y  y + u(y)                          ViT, pre-norm hosts
    post_norm    a norm of a sum s     norm(s + u(norm(s)))              BERT and its kind

Houlsby et al., ICML 2019 (arXiv:1902.00751); `post_norm` is the placement of Pfeiffer et al., EACL
2021 (arXiv:2005.00247), `seq_bn` in the package `adapters`: there s is the feed-forward's output
plus what went into it, so u sees what the host would have put out, and the host's own norm has the
last word. Adapters start as there: weights from N(0, 0.02^2), biases 0.

    found = sites(model, r".*layer\\.\\d+\\.output\\.LayerNorm")
    own = fresh(found, 24, generator=rng)                       # a BottleneckAdapter for each
    with attach(model, own, "post_norm"):
        model(x)                                                # runs with them, and trains them
    AdapterSet.of(own, "post_norm").save("reviews.safetensors", model)
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from pluribus.core.errors import FormatError, InputError, MismatchError, nearest
from pluribus.core.shapes import Float
from pluribus.route._adapter_file import check_base, read
from pluribus.route._inventory import widths
from pluribus.route._skills import write
from pluribus.route.parts import Activation, Bottleneck, activated
from pluribus.route.store import FIELDS, digest

Placement = Literal["behind", "post_norm"]
Summand = Callable[[Tensor], Tensor]  # what is added, from what the adapters see

FORMAT = "pluribus adapters 1"
INIT_STD = 0.02  # of a new adapter's weights


class BottleneckAdapter(nn.Module):
    """One adapter; a call returns u(x) alone, without x. Raises InputError for sizes below 1."""

    def __init__(
        self, width: int, bottleneck: int, activation: Activation = "relu", *, generator: Generator
    ) -> None:
        super().__init__()
        if width < 1 or bottleneck < 1:
            raise InputError(f"an adapter of width {width} and bottleneck {bottleneck}; both >= 1")
        if activation not in get_args(Activation):
            raise InputError(
                f"activation {activation!r}; expected one of {', '.join(get_args(Activation))}"
            )
        self.activation: Activation = activation
        self.down = nn.Parameter(INIT_STD * torch.randn(bottleneck, width, generator=generator))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(INIT_STD * torch.randn(width, bottleneck, generator=generator))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "b *s d"]) -> Float[Tensor, "b *s d"]:
        """Return what the adapter adds."""
        return added(x, self)

    def part(self) -> Bottleneck:
        """Return a copy of it as it stands, frozen."""
        return Bottleneck(
            **{field: getattr(self, field).detach().clone() for field in FIELDS["bottleneck"]},
            activation=self.activation,
        )

    @classmethod
    def of(cls, part: Bottleneck) -> "BottleneckAdapter":
        """Return a trainable copy of a part."""
        width, bottleneck = part.up.shape
        made = cls(width, bottleneck, part.activation, generator=Generator())
        for field in FIELDS["bottleneck"]:
            setattr(made, field, nn.Parameter(getattr(part, field).detach().clone()))
        return made


def added(
    x: Float[Tensor, "b *s d"], adapter: BottleneckAdapter | Bottleneck
) -> Float[Tensor, "b *s d"]:
    """Return u(x), in x's dtype: what an adapter adds where it sees x."""
    seen = x.to(adapter.down.dtype)
    inner = activated(adapter.activation, linear(seen, adapter.down, adapter.down_bias))
    return linear(inner, adapter.up, adapter.up_bias).to(x.dtype)


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """What one task learned: a frozen adapter for each module that has one, and how they stand."""

    layers: Mapping[str, Bottleneck]
    placement: Placement = "behind"

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("a set of adapters with no layer; name the modules they stand behind")
        check_placement(self.placement)

    @classmethod
    def of(
        cls, modules: Mapping[str, BottleneckAdapter], placement: Placement = "behind"
    ) -> "AdapterSet":
        """Return copies of trainable adapters, frozen."""
        return cls({path: one.part() for path, one in modules.items()}, placement)

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return sum(
            getattr(one, field).numel()
            for one in self.layers.values()
            for field in FIELDS["bottleneck"]
        )

    @property
    def digest(self) -> str:
        """A digest of its tensors and what they are for."""
        from xxhash import xxh3_128

        state = xxh3_128(self.placement.encode())
        for path, one in sorted(self.layers.items()):
            state.update(f"{path} {one.activation}".encode())
            for field in FIELDS["bottleneck"]:
                tensor = getattr(one, field).detach().cpu().contiguous()
                state.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
                state.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return state.hexdigest()

    def to(self, device: torch.device | str) -> "AdapterSet":
        """Return it on a device."""
        layers = {
            path: replace(one, **{f: getattr(one, f).to(device) for f in FIELDS["bottleneck"]})
            for path, one in self.layers.items()
        }
        return AdapterSet(layers, self.placement)

    def part(self) -> dict[str, Bottleneck]:
        """Return it as a part for `Routed`. Raises InputError unless it stands behind modules."""
        if self.placement != "behind":
            raise InputError(
                f"adapters placed {self.placement} are no part of a composite, which adds to what "
                "a module puts out; run them with pluribus.route.adapters.attach"
            )
        return dict(self.layers)

    def attach(self, model: nn.Module) -> "Attached":
        """Run them in a model until the `with` block ends, or `detach()`. See `attach`."""

        def summand(one: Bottleneck) -> Summand:
            return lambda x: added(x, one)

        layers = {path: summand(one) for path, one in self.layers.items()}
        return attach(model, layers, self.placement)

    def save(
        self, path: str | os.PathLike[str], model: nn.Module, *, overwrite: bool = False
    ) -> None:
        """Write one safetensors file, with the digest of the model it is for. Raises OutputError"""
        tensors = {
            f"{field}/{name}": getattr(one, field)
            for name, one in self.layers.items()
            for field in FIELDS["bottleneck"]
        }
        table = {
            "format": FORMAT,
            "placement": self.placement,
            "layers": {name: one.activation for name, one in self.layers.items()},
            "base": digest(model),
        }
        write(Path(path), table, tensors, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> "AdapterSet":
        """Read what `save` wrote.

        Raises MissingError, FormatError, or MismatchError for another model than it was made for.
        """
        path = Path(path)
        table, tensors = read(path, FORMAT, ("placement", "layers", "base"))
        check_base(path, table["base"], model)
        try:
            layers = {
                name: Bottleneck(
                    **{field: tensors[f"{field}/{name}"] for field in FIELDS["bottleneck"]},
                    activation=activation,
                )
                for name, activation in table["layers"].items()
            }
        except KeyError as error:
            raise FormatError(f"{path}: lacks the tensor {error}; it is not whole") from None
        return cls(layers, table["placement"])


def sites(model: nn.Module, pattern: str) -> dict[str, int]:
    """Return the modules whose whole name matches, with the width of what they put out.

    Raises InputError for a pattern that is none or matches nothing, or a module of unknown width.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise InputError(f"layers {pattern!r} is no regular expression: {error}") from None
    modules = {path: module for path, module in model.named_modules() if path}
    found = {path: _width(path, m) for path, m in modules.items() if wanted.fullmatch(path)}
    if not found:
        raise InputError(
            f"layers {pattern!r} matches no module; it is matched against whole names."
            f"{nearest(pattern, modules)}"
        )
    return found


def fresh(
    found: Mapping[str, int],
    bottleneck: int,
    activation: Activation = "relu",
    *,
    generator: Generator,
) -> dict[str, BottleneckAdapter]:
    """Return a new adapter for each of some `sites`."""
    return {
        path: BottleneckAdapter(width, bottleneck, activation, generator=generator)
        for path, width in found.items()
    }


class Attached:
    """Adapters that run in a model, until `detach` or the end of the `with` block."""

    def __init__(self, model: nn.Module, placement: Placement) -> None:
        self.model, self.placement = model, placement
        self.seen: set[str] = set()  # modules that have run
        self.paths: tuple[str, ...] = ()
        self._handles: list[Any] = []

    def hook(self, path: str, module: nn.Module, summand: Summand) -> None:
        """Add one adapter."""

        def behind(module: nn.Module, args: tuple, out: Any) -> Any:
            self.seen.add(path)
            if isinstance(out, tuple):
                return (out[0] + summand(out[0]), *out[1:])
            return out + summand(out)

        def post_norm(module: nn.Module, args: tuple, out: Any) -> Any:
            self.seen.add(path)
            return module.forward(args[0] + summand(out))

        self.paths = (*self.paths, path)
        chosen = behind if self.placement == "behind" else post_norm
        self._handles.append(module.register_forward_hook(chosen))

    def check_ran(self) -> None:
        """Raise MismatchError if the model has run without one of the modules."""
        if silent := [path for path in self.paths if path not in self.seen]:
            raise MismatchError(
                f"the model does not run {silent[0]} on these inputs, so the adapter there does "
                "nothing; name modules that run"
            )

    def detach(self) -> nn.Module:
        """Take the adapters out, and return the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model

    def __enter__(self) -> "Attached":
        """Return itself; the adapters run already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the adapters out."""
        self.detach()


def attach(
    model: nn.Module, layers: Mapping[str, Summand], placement: Placement = "behind"
) -> Attached:
    """Let what `layers` says run in a model, which is neither copied nor changed.

    Each value, called with what the adapters see (b, ..., d), returns what is added. Raises
    MismatchError for a module that isn't there, InputError for a module that `post_norm` cannot
    stand at, or another placement.
    """
    check_placement(placement)
    modules = dict(model.named_modules())
    for path in layers:
        if path not in modules:
            raise MismatchError(
                f"the model has no module {path!r} to put an adapter at.{nearest(path, modules)}"
            )
        if placement == "post_norm" and "norm" not in type(modules[path]).__name__.lower():
            raise InputError(
                f"{path} is a {type(modules[path]).__name__}, but post_norm adapters stand at the "
                "norm behind a feed-forward sum; name that, or place them behind"
            )
    made = Attached(model, placement)
    for path, summand in layers.items():
        made.hook(path, modules[path], summand)
    return made


def check_placement(placement: object) -> None:
    """Raise InputError for a placement that is none."""
    if placement not in get_args(Placement):
        raise InputError(
            f"placement {placement!r}; expected one of {', '.join(get_args(Placement))}"
        )


def _width(path: str, module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return int(shape[-1])
    try:
        return widths(module)[1]
    except InputError:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            return len(weight)
    raise InputError(
        f"how wide {path}, a {type(module).__name__}, puts out is not known; name the linear layer "
        "or the norm that ends the feed-forward block"
    )

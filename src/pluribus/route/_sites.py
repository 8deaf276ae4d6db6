"""Where parts are mixed in: forward hooks on the base's own modules, which stay as they are.

    linear       y + delta(x)                    embedding   y + delta[ids]
    convolution  y + delta * x                   norm        y + n(x) dg + db, n(x) without affine
    batch norm   anew, with each row's own statistics, gain and bias

Low-rank deltas are two batched products; dense and masked ones run once for each kind of mixture in
the batch (one-hot routes: for each part that is used), or once for each part where that is less.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pluribus.core.errors import MismatchError
from pluribus.route._adding import free
from pluribus.route._banks import (
    Bank,
    Banks,
    DenseBank,
    LowRankBank,
    MaskedBank,
    ScaledBank,
    by_row,
)
from pluribus.route._batch import close
from pluribus.route._inventory import is_transposed
from pluribus.route._packed import Packed
from pluribus.route._route import Current, Route
from pluribus.route.parts import Activation, Bottleneck, activated

CONVOLUTIONS: dict[type, Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
NONE = Banks()


def mixer(module: nn.Module) -> "type[Site] | None":
    """Return what mixes deltas into a module's output, or None if nothing here can."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return LinearSite
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return EmbeddingSite if type(module).forward is nn.Embedding.forward else LookupSite
    if type(module) in CONVOLUTIONS and getattr(module, "padding_mode", "zeros") == "zeros":
        return ConvolutionSite
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
        return BatchNormSite
    if isinstance(module, nn.LayerNorm | nn.GroupNorm) or _is_rms(module):
        return NormSite
    return None


def _is_rms(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    weight = getattr(module, "weight", None)
    return named and weight is not None and weight.ndim == 1 and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(getattr(module, name, None), float):
            return getattr(module, name)
    return None


class UnlikeError(MismatchError):
    """A module is not what its class says, so that nothing can be mixed where it runs.

    `certain`: whatever it was given.
    """

    def __init__(self, site: "Site", what: str, *, certain: bool = True) -> None:
        super().__init__(
            f"{site.path} ({type(site.module).__name__}) {what}, so that its parts cannot be mixed "
            "where it runs; call the composite once on a batch of plain tensors, without an "
            "attention cache, and it finds another way"
        )
        self.site, self.certain = site, certain


class Site(nn.Module, ABC):
    """A module of the base and the deltas of its tensors."""

    tensors: tuple[str, ...] = ("weight", "bias")

    def __init__(self, path: str, module: nn.Module, tables: Mapping[str, Banks]) -> None:
        super().__init__()
        self.path = path
        self._module = [module]  # in a list: it stays the base's child, not ours
        self.banks = nn.ModuleDict(tables)
        self.seen = False
        self.known: set[bool] = set()  # which guesses turned out right: see `Route.note`

    @property
    def module(self) -> Any:
        """The base's module."""
        return self._module[0]

    def of(self, name: str) -> Banks:
        """Return the banks of one of the module's tensors."""
        return self.banks._modules.get(name) or NONE  # type: ignore[return-value]

    def attach(self, current: Current) -> Any:
        """Mix whenever the module runs and a route is set; return the hook's handle."""

        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
            if current.route is None:
                return None
            if not self.seen:
                self.seen = True
            x = args[0] if args else next(iter(kwargs.values()))
            if not x.ndim or len(x) != current.route.rows:
                self.unlike_batch(x, current.route)
            return self.mix(x, out, current.route)

        return self.module.register_forward_hook(hook, with_kwargs=True)

    def unlike_batch(self, x: Tensor, route: Route) -> None:
        """Take inputs (b s, ...) for the batch's, flattened, which is checked where it can be.

        They may be what all inputs share. Raises UnlikeError if they are not so many.
        """
        given = len(x) if x.ndim else 0
        if not given or given % route.rows:
            what = f"was given {given} rows, but the route is for a batch of {route.rows}"
            raise UnlikeError(self, what, certain=False)
        if True not in self.known:
            route.note(self, True, doubtful=False)

    @abstractmethod
    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """Return the output with every row's mixture of parts."""

    def rows_of(self, name: str, route: Route, rows: int) -> Tensor | None:
        """Return each row's delta of a small tensor (b, ...), or None if there is none."""
        found = self.of(name)
        return by_row(found, route, rows, getattr(self.module, name)) if len(found) else None

    def wholly(
        self,
        x: Tensor,
        y: Tensor,
        route: Route,
        apply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Add dense and masked deltas of the weight; `apply` is the layer without bias.

        One run for each kind of mixture, or for each part if parts are fewer.
        """
        for bank in self.of("weight"):
            if not isinstance(bank, DenseBank | MaskedBank):
                continue
            rows, base = len(x), self.module.weight
            groups = route.groups(rows, bank.members)
            if len(groups) <= len(bank.members) and not route.weights.requires_grad:
                for places, weights in groups:
                    if not bool(weights.any()):
                        continue
                    delta = bank.mixture(weights.to(base.dtype), base)
                    if places is None:
                        y = y + apply(x, delta)
                    else:
                        y = y.index_add(0, places, apply(x[places], delta))
                continue
            table = route.of(rows, bank.members)
            for number in range(len(bank.members)):
                places = table[:, number].nonzero().flatten()
                if len(places):
                    weights = table[places, number].view(-1, *[1] * (y.ndim - 1)).to(y.dtype)
                    found = apply(x[places], bank.at(number).delta(base))
                    y = y.index_add(0, places, weights * found)
        return y


class LinearSite(Site):
    """nn.Linear, and GPT-2's Conv1D."""

    def __init__(self, path: str, module: nn.Module, tables: Mapping[str, Banks]) -> None:
        super().__init__(path, module, tables)
        self._transposed = is_transposed(module)
        kinds = [type(bank) for bank in self.of("weight")]
        bare = len(kinds) == 1 and not len(self.of("bias"))
        # in a tuple: a bank is a child of its own list already
        self._alone: tuple[Any, ...] = (
            tuple(self.of("weight")) if bare and kinds == [LowRankBank] else ()
        )

    def attach(self, current: Current) -> Any:
        """See `Site.attach`; the usual case, at every step of a decoder, on the shortest way."""
        if not self._alone:
            return super().attach(current)
        add, transposed = self._alone[0].add, self._transposed

        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
            if current.route is None:
                return None
            if not self.seen:
                self.seen = True
            x = args[0] if args else next(iter(kwargs.values()))
            if x.size(0) != current.route.rows:
                self.unlike_batch(x, current.route)
            if x.ndim == 3:
                return add(x, out, current.route, transposed=transposed)
            return self.mix(x, out, current.route)

        return self.module.register_forward_hook(hook, with_kwargs=True)

    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """See `Site.mix`."""
        rows, transposed = len(x), self._transposed
        plain = y
        for bank in self.of("weight"):
            if isinstance(bank, LowRankBank):
                y = self._low_rank(bank, x, y, route)
            elif isinstance(bank, ScaledBank):
                bias = self.module.bias
                gains = route.of(rows, bank.members).to(y.dtype) @ bank.gains
                if transposed:  # rows of the weight are inputs
                    y = y + (_spread(gains, x) * x) @ self.module.weight
                    continue
                y = y + _spread(gains, y) * (plain if bias is None else plain - bias)

        def apply(some: Tensor, delta: Tensor) -> Tensor:
            return some @ delta if transposed else F.linear(some, delta)

        y = self.wholly(x, y, route, apply)
        bias = self.rows_of("bias", route, rows)
        return y if bias is None else _plus(y, _spread(bias, y))

    def _low_rank(self, bank: LowRankBank, x: Tensor, y: Tensor, route: Route) -> Tensor:
        flat_x, flat_y = (some.reshape(len(x), -1, some.shape[-1]) for some in (x, y))
        return bank.add(flat_x, flat_y, route, transposed=self._transposed).view(y.shape)


class ConvolutionSite(Site):
    """Convolutions, grouped ones too."""

    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """See `Site.mix`."""
        conv, plain = self.module, y

        def apply(some: Tensor, delta: Tensor, groups: int | None = None) -> Tensor:
            run = CONVOLUTIONS[type(conv)]
            count = conv.groups if groups is None else groups
            return run(some, delta, None, conv.stride, conv.padding, conv.dilation, count)

        for bank in self.of("weight"):
            if isinstance(bank, LowRankBank):
                y = self._low_rank(bank, x, y, route, apply)
            elif isinstance(bank, ScaledBank):
                gains = route.of(len(x), bank.members).to(y.dtype) @ bank.gains
                bare = plain if conv.bias is None else plain - _channels(conv.bias[None], y)
                y = y + _channels(gains, y) * bare
        y = self.wholly(x, y, route, apply)
        bias = self.rows_of("bias", route, len(x))
        return y if bias is None else _plus(y, _channels(bias, y))

    def _low_rank(
        self, bank: LowRankBank, x: Tensor, y: Tensor, route: Route, apply: Callable[..., Tensor]
    ) -> Tensor:
        """Convolve with all parts' `a` as kernels, weigh their maps, combine them by `b`.

        Grouped kernels differ from group to group, which no factor can say: those are built.
        """
        shape = self.module.weight.shape
        weights = route.of(len(x), bank.members).to(x.dtype)
        if self.module.groups > 1:
            for number in range(len(bank.members)):
                found = apply(x, bank.at(number).delta(self.module.weight))
                y = y + _channels(weights[:, number : number + 1], y) * found
            return y
        packed = route.packed(len(x), bank.members)
        if packed is None:
            return y
        m, rank, _ = bank.a.shape
        if 2 * packed.filled > len(x) * packed.used:  # most parts on most rows
            maps = apply(x, bank.a.to(x.dtype).view(m * rank, *shape[1:]))
            maps = maps * _channels(weights.repeat_interleave(rank, 1), maps)
            return y + torch.einsum("br...,rR->bR...", maps, bank.b.to(x.dtype).flatten(0, 1))
        return y + self._packed(bank, x, y, packed, apply)

    def _packed(
        self, bank: LowRankBank, x: Tensor, y: Tensor, packed: Packed, apply: Callable[..., Tensor]
    ) -> Tensor:
        """Convolve each part's `a` with its own rows alone: parts are groups of channels."""
        places = packed.places
        parts, most = places.rows.shape
        a, b = bank.a.to(x.dtype), bank.b.to(x.dtype)
        if places.owners is not None:
            a, b = a[places.owners], b[places.owners]
        rank = a.shape[1]
        picked = x.index_select(0, places.rows.flatten()).view(parts, most, *x.shape[1:])
        picked = picked.transpose(0, 1).reshape(most, -1, *x.shape[2:])
        maps = apply(picked, a.reshape(parts * rank, *self.module.weight.shape[1:]), parts)
        maps = maps.view(most, parts, rank, -1).permute(1, 0, 2, 3)
        if not packed.plain:
            maps = maps * places.weights.to(maps.dtype)[:, :, None, None]
        found = (b.transpose(1, 2)[:, None] @ maps).view(parts * most, *y.shape[1:])
        if not packed.even:
            found[-1] = 0  # what stands there is of a row that was read for nothing
        out, *others = (found.index_select(0, column) for column in places.slots.unbind(1))
        return sum(others, out)


class EmbeddingSite(Site):
    """Rows of a table.

    Ids may be the same for all inputs, as places are: (1, s), (s,). The output then gets a row for
    each input. Shapes alone do not tell, so the composite checks on its first mixed batch that it
    gives what rows alone give (`Route.note`); `shared` is what it found of ids unlike (b, ...).
    """

    tensors = ("weight",)

    def __init__(self, path: str, module: nn.Module, tables: Mapping[str, Banks]) -> None:
        super().__init__(path, module, tables)
        self.shared: bool | None = None

    def unlike_batch(self, x: Tensor, route: Route) -> None:
        """See `mix`."""

    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """See `Site.mix`; x are the ids (b, ...)."""
        by_row = y.ndim > 2 and len(y) == route.rows
        if not by_row and route.same and not route.weights.requires_grad:
            return self._common(x, y, route.weights[:1])[0]
        one = y.ndim > 2 and len(y) == 1  # as models of transformers number their places
        doubtful = not by_row and not one
        if doubtful and self.shared is not None:
            shared = self.shared
        else:
            shared = one or (doubtful and self._seems_shared(x, y, route.rows))
        if shared not in self.known:
            route.note(self, shared, doubtful=doubtful)
        if not shared:
            return self._own(x, y, route)
        if one and len(x) == 1:
            x, y = x[0], y[0]
        return self._common(x, y, route.weights)

    def _seems_shared(self, x: Tensor, y: Tensor, rows: int) -> bool:
        return not x.ndim or len(x) % rows != 0 or _counts(x)

    def _own(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """Add each row's deltas at its own ids (b, ...)."""
        for bank in self.of("weight"):
            weights = route.of(len(y), bank.members).to(y.dtype)
            for place in range(len(bank.members)):
                rows = weights[:, place].detach().nonzero().flatten()
                if not len(rows):
                    continue
                every = len(rows) == len(y)
                found = self._rows(bank, place, x, None if every else rows).to(y.dtype)
                found = _spread(weights[rows, place : place + 1], found) * found
                y = y + found if every else y.index_add(0, rows, found)
        return y

    def _common(self, x: Tensor, y: Tensor, table: Tensor) -> Tensor:
        """Return y with each row's deltas (b, *y.shape) at ids that all rows share."""
        y = y.expand(len(table), *y.shape)
        for bank in self.of("weight"):
            weights = table[:, list(bank.members)].to(y.dtype)
            for place in weights.detach().any(0).nonzero().flatten().tolist():
                found = self._rows(bank, place, x, None).to(y.dtype).view(y.shape[1:])
                y = y + weights[:, place].view(-1, *[1] * found.ndim) * found
        return y

    def _rows(self, bank: Bank, place: int, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return one part's deltas of the ids' rows of the table, for all inputs or some."""
        ids = ids if rows is None else ids[rows]
        if isinstance(bank, LowRankBank):
            b, a = bank.b[place], bank.a[place]
            return b.t()[ids].to(self.module.weight.dtype) @ a.to(self.module.weight.dtype)
        if isinstance(bank, DenseBank):
            return bank.values[place][ids]
        return bank.at(place).delta(self.module.weight)[ids]


class LookupSite(EmbeddingSite):
    """Tables with a forward of their own: other ids than those given, as places; a factor.

    That forward runs on each part's own table, since what it gives is linear in the table, which is
    tried once.
    """

    def __init__(self, path: str, module: nn.Module, tables: Mapping[str, Banks]) -> None:
        super().__init__(path, module, tables)
        self.linear = False
        self._given: tuple[tuple, dict[str, Any]] = (), {}

    def attach(self, current: Current) -> Any:
        """See `Site.attach`."""

        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
            if current.route is None:
                return None
            self.seen = True
            self._given = args, kwargs
            try:
                return self.mix(torch.empty(len(out), 0), out, current.route)
            finally:
                self._given = (), {}

        return self.module.register_forward_hook(hook, with_kwargs=True)

    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """See `Site.mix`. Raises UnlikeError if the output is not linear in the table."""
        if not self.linear:
            twice = self._looked_up(2 * self.module.weight.detach())
            self.linear = isinstance(y, Tensor) and close(twice, 2 * y)
            if not self.linear:
                raise UnlikeError(self, "has a forward of its own")
        return super().mix(x, y, route)

    def _looked_up(self, table: Tensor) -> Tensor:
        args, kwargs = self._given
        parameters = self.module._parameters
        own = parameters["weight"]
        try:
            parameters["weight"] = table
            return type(self.module).forward(self.module, *args, **kwargs)
        finally:
            parameters["weight"] = own

    def _seems_shared(self, x: Tensor, y: Tensor, rows: int) -> bool:
        return True

    def _rows(self, bank: Bank, place: int, ids: Tensor, rows: Tensor | None) -> Tensor:
        kind = self.module.weight.dtype
        if isinstance(bank, LowRankBank):
            found = self._looked_up(bank.b[place].t().to(kind)) @ bank.a[place].to(kind)
        else:
            found = self._looked_up(bank.at(place).delta(self.module.weight).to(kind))
        return found if rows is None else found[rows]


def _counts(ids: Tensor) -> bool:
    """Whether these are places: one more each time."""
    steps = torch.arange(len(ids), device=ids.device)
    return ids.ndim == 1 and bool((ids - ids[0] == steps).all())


class NormSite(Site):
    """LayerNorm, GroupNorm, and every RMSNorm of the usual form.

    A LayerNorm with a forward of its own may have its channels elsewhere: it is compared once.
    """

    def __init__(self, path: str, module: nn.Module, tables: Mapping[str, Banks]) -> None:
        super().__init__(path, module, tables)
        usual = (nn.LayerNorm.forward, nn.GroupNorm.forward)
        self.usual = _is_rms(module) or type(module).forward in usual

    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """See `Site.mix`. Raises UnlikeError if the module is not the norm that it seems to be."""
        if not self.usual:
            self.usual = self._as_usual(x, y)
            if not self.usual:
                raise UnlikeError(self, "has a forward of its own")
        gain, bias = (self.rows_of(name, route, len(x)) for name in ("weight", "bias"))
        spread = _channels if isinstance(self.module, nn.GroupNorm) else self._last
        if gain is not None:
            normed, gain = self._normed(x), spread(gain, y)
            if normed.dtype is not y.dtype:
                y = y + (gain * normed).to(y.dtype)
            elif free(y, gain, normed):
                y = y.addcmul_(gain, normed)
            else:
                y = torch.addcmul(y, gain, normed)
        return y if bias is None else _plus(y, spread(bias, y))

    def _as_usual(self, x: Tensor, y: Tensor) -> bool:
        if self.module.normalized_shape != x.shape[-len(self.module.normalized_shape) :]:
            return False
        found = self._normed(x.detach())
        if self.module.weight is not None:
            found = found * self.module.weight
        return close(found if self.module.bias is None else found + self.module.bias, y)

    def _normed(self, x: Tensor) -> Tensor:
        norm = self.module
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, eps=norm.eps)
        epsilon = _epsilon(norm)
        assert epsilon is not None
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return normed.to(x.dtype)

    @staticmethod
    def _last(rows: Tensor, y: Tensor) -> Tensor:
        return rows.view(len(rows), *[1] * (y.ndim - rows.ndim), *rows.shape[1:])


class BatchNormSite(Site):
    """Batch norms in evaluation mode; each row has its own statistics."""

    tensors = ("weight", "bias", "running_mean", "running_var")

    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """See `Site.mix`. Raises MismatchError in training mode, where rows share statistics."""
        norm = self.module
        if norm.training:
            raise MismatchError(
                f"{self.path} is a batch norm in training mode; rows of different parts cannot "
                "share its statistics: call eval()"
            )

        def own(name: str) -> Tensor | None:
            found = getattr(norm, name)
            delta = self.rows_of(name, route, len(x))
            if found is None:
                return None
            return _channels(found[None] if delta is None else found + delta, x)

        mean, variance, gain, bias = (
            own(n) for n in ("running_mean", "running_var", "weight", "bias")
        )
        assert mean is not None
        assert variance is not None
        out = (x - mean) * torch.rsqrt(variance.clamp(min=0) + norm.eps)
        out = out if gain is None else out * gain
        return out if bias is None else out + bias


class AdapterSite(Site):
    """Bottleneck adapters behind a module: y + sum_t w_t up_t act(down_t y)."""

    def __init__(self, path: str, module: nn.Module, found: Mapping[int, Bottleneck]) -> None:
        super().__init__(path, module, {})
        self.members = tuple(found)
        self.activations: tuple[Activation, ...] = tuple(one.activation for one in found.values())
        for field in ("down", "down_bias", "up", "up_bias"):
            for number, one in found.items():
                self.register_parameter(
                    f"{field}_{number}", nn.Parameter(getattr(one, field), requires_grad=False)
                )

    def attach(self, current: Current) -> Any:
        """See `Site.attach`; the first of several outputs is adapted."""

        def hook(module: nn.Module, args: tuple, out: Any) -> Any:
            if current.route is None:
                return None
            self.seen = True
            if isinstance(out, tuple):
                return (self.mix(out[0], out[0], current.route), *out[1:])
            return self.mix(out, out, current.route)

        return self.module.register_forward_hook(hook)

    def mix(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """See `Site.mix`."""
        weights = route.of(len(x), self.members).to(y.dtype)
        out = y
        for place, number in enumerate(self.members):
            rows = weights[:, place].detach().nonzero().flatten()
            if not len(rows):
                continue
            some = y if len(rows) == len(y) else y[rows]
            h = F.linear(some, self._of("down", number), self._of("down_bias", number))
            h = activated(self.activations[place], h)
            h = F.linear(h, self._of("up", number), self._of("up_bias", number))
            h = _spread(weights[rows, place : place + 1], h) * h
            out = out + h if len(rows) == len(y) else out.index_add(0, rows, h)
        return out

    def _of(self, field: str, number: int) -> Tensor:
        return getattr(self, f"{field}_{number}")

    def at(self, number: int) -> Bottleneck:
        """Return one part's adapter."""
        down, down_bias, up, up_bias = (
            self._of(f, number) for f in ("down", "down_bias", "up", "up_bias")
        )
        kind = self.activations[self.members.index(number)]
        return Bottleneck(down, down_bias, up, up_bias, kind)


def _plus(y: Tensor, more: Tensor) -> Tensor:
    """Add to a layer's output, in its place if nobody needs it as it was."""
    return y.add_(more) if free(y, more) else y + more


def _spread(rows: Tensor, y: Tensor) -> Tensor:
    """Return (b, d) as (b, 1, ..., d)."""
    return rows.view(len(rows), *[1] * (y.ndim - 2), rows.shape[-1])


def _channels(rows: Tensor, y: Tensor) -> Tensor:
    """Return (b, d) as (b, d, 1, ...)."""
    return rows.view(*rows.shape[:2], *[1] * (y.ndim - 2))

"""Several parts' deltas of one tensor, stacked by form, as layers mix them.

    low rank   a (m, r, c), b (m, r, R); smaller ranks are filled up with zeros
    dense      (m, ...)            masked   bits (m, n8) on one vector (...)
    scaled     gain - 1, (m, R)

m counts the parts that touch the tensor, `members` says which of all they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual

from pluribus.core.shapes import Float, Shaped
from pluribus.kernels import low_rank_rows
from pluribus.route._route import Packed, Route
from pluribus.route.parts import Delta, Dense, LowRank, Masked, Scaled, unpacked

# What one way of adding takes, in microseconds: to begin, and a product. Fitted to times of ranks 8
# and 32, widths 384 and 1536, in float32 with two threads; only what is the quicker matters.
BEGIN = {"fused": 8.0, "by row": 20.0, "packed": 95.0, "whole": 48.0}
PRODUCT = {"fused": 3.2e-5, "by row": 1.0e-5, "packed": 4.3e-6, "whole": 7.8e-6}
MOVED = 2.4e-4  # a value that is copied to another place


def _kept(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class LowRankBank(nn.Module):
    """Factors of some parts; those of another type than their inputs are cast at each use."""

    def __init__(self, members: Sequence[int], deltas: Sequence[LowRank]) -> None:
        super().__init__()
        self.members, self.ranks = tuple(members), tuple(len(d.a) for d in deltas)
        rank = max(self.ranks)

        def filled(tensor: Tensor) -> Tensor:
            return nn.functional.pad(tensor, (0, 0, 0, rank - len(tensor)))

        self.a = _kept(torch.stack([filled(d.a) for d in deltas]))
        self.b = _kept(torch.stack([filled(d.b.t()) for d in deltas]))

    def at(self, place: int) -> LowRank:
        """Return one part's delta."""
        rank = self.ranks[place]
        return LowRank(self.a[place, :rank], self.b[place, :rank].t())

    def mixture(self, weights: Float[Tensor, " m"], base: Tensor) -> Tensor:
        """Return the weighted sum of the deltas, in the base's shape."""
        b = (self.b.to(base.dtype) * weights[:, None, None]).flatten(0, 1)
        return (b.t() @ self.a.to(base.dtype).flatten(0, 1)).reshape(base.shape)

    def add(
        self,
        x: Float[Tensor, "b s c"],
        y: Float[Tensor, "b s R"],
        route: Route,
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "b s R"]:
        """Return y + sum_t w_t b_t a_t x for all rows at once.

        Fused: each row by its own factors, read where they are. By row: in two batched products, of
        gathered factors. Packed: each part on its own rows, padded to as many as the part with most
        has. Whole: all parts in use on all rows. The way is chosen by the time it should take. May
        write into y.
        `transposed`: the tensor is (inputs, outputs), so what is added is x b_t a_t.
        """
        first, second = (self.b, self.a) if transposed else (self.a, self.b)
        packed = route.packed(len(x), self.members)
        if packed is None:
            return y
        first, second = first.to(x.dtype), second.to(x.dtype)
        way = quickest(x, y, first, second, packed)
        if way in ("fused", "by row"):
            return (_fused if way == "fused" else _by_row)(x, y, first, second, packed)
        if len(packed.used) < len(first):
            first, second = first[packed.used], second[packed.used]
        return (_packed if way == "packed" else _whole)(x, y, first, second, packed)


def quickest(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> str:
    """Return the way of adding that should take the shortest time."""
    rows, places, inputs = x.shape
    _, rank, outputs = second.shape
    fused = _fusible(x, y, first, second, packed.table)
    counts = len(packed.used), packed.rows.numel(), packed.slots.numel()
    return _quickest(fused, rows, places, inputs, rank, outputs, *counts)


@lru_cache(1024)
def _quickest(
    fused: bool,
    rows: int,
    places: int,
    inputs: int,
    rank: int,
    outputs: int,
    used: int,
    filled: int,
    own: int,
) -> str:
    each = rank * (inputs + outputs)
    products = {
        "fused": own * places * each,
        "by row": own * places * each,
        "packed": filled * places * each,
        "whole": rows * used * places * each,
    }
    values = {
        "fused": 0,
        "by row": own * each,
        "packed": places * (filled * (inputs + outputs) + own * outputs),
        "whole": rows * places * (used * rank + outputs),
    }
    times = {way: BEGIN[way] + PRODUCT[way] * products[way] + MOVED * values[way] for way in BEGIN}
    if not fused:
        del times["fused"]
    return min(times, key=times.__getitem__)


def _fusible(*tensors: Tensor) -> bool:
    """Whether the kernel may have these: float32 in the processor's memory, and nobody follows."""
    if not _free(*tensors) or torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
        if unpack_dual(tensor)[1] is not None:
            return False
    return True


def _fused(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    y = y.contiguous()
    flat = x.contiguous().flatten(0, 1), y.flatten(0, 1)
    given = (*flat, first, second, packed.used, packed.rows, packed.weights)
    low_rank_rows.add(*[tensor.detach().numpy() for tensor in given], places=x.shape[1])
    return y


def _packed(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    used, most = packed.rows.shape
    places = x.shape[1]
    # Picked rows lie as those of x do, which may be transposed: a view is not always possible.
    picked = x[packed.rows.flatten()].reshape(used, most * places, -1)
    h = torch.bmm(picked, first.transpose(1, 2))
    if not packed.plain:
        weights = packed.weights.to(h.dtype)[:, :, None, None]
        h = (h.view(used, most, places, -1) * weights).view(h.shape)
    found = torch.bmm(h, second).view(used * most, places, -1)
    for column in packed.slots.unbind(1):
        y = y.add_(found[column]) if _free(y, found) else y + found[column]
    return y


def _by_row(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    h = torch.bmm(x, first[packed.parts].flatten(1, 2).transpose(1, 2))
    if not packed.plain:
        weights = packed.weights.to(h.dtype).flatten()[packed.slots]
        h = h * weights.repeat_interleave(first.shape[1], 1)[:, None]
    second = second[packed.parts].flatten(1, 2)
    return y.baddbmm_(h, second) if _free(y, h) else torch.baddbmm(y, h, second)


def _free(*tensors: Tensor) -> bool:
    """Whether nobody maps them or needs a gradient, so that the first may be written into."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not any(is_functorch_wrapped_tensor(t) for t in tensors)


def _whole(x: Tensor, y: Tensor, first: Tensor, second: Tensor, packed: Packed) -> Tensor:
    used, rank, _ = first.shape
    rows, places, _ = y.shape
    weights = packed.table.to(x.dtype)
    h = (x @ first.flatten(0, 1).t()).unflatten(2, (used, rank)) * weights[:, None, :, None]
    flat = torch.addmm(y.flatten(0, 1), h.flatten(2).flatten(0, 1), second.flatten(0, 1))
    return flat.unflatten(0, (rows, places))


class DenseBank(nn.Module):
    """Whole deltas of some parts."""

    def __init__(self, members: Sequence[int], deltas: Sequence[Dense]) -> None:
        super().__init__()
        self.members = tuple(members)
        self.values = _kept(torch.stack([d.values for d in deltas]))

    def at(self, place: int) -> Dense:
        """Return one part's delta."""
        return Dense(self.values[place])

    def mixture(self, weights: Float[Tensor, " m"], base: Tensor) -> Tensor:
        """Return the weighted sum of the deltas, in the base's shape."""
        return (weights @ self.values.flatten(1)).reshape(base.shape)


class MaskedBank(nn.Module):
    """Masks of some parts on one vector."""

    def __init__(self, members: Sequence[int], deltas: Sequence[Masked]) -> None:
        super().__init__()
        self.members = tuple(members)
        self.vector = _kept(deltas[0].vector)
        self.register_buffer("bits", torch.stack([d.bits for d in deltas]))
        self.bits: Tensor

    def at(self, place: int) -> Masked:
        """Return one part's delta."""
        return Masked(self.bits[place], self.vector)

    def mixture(self, weights: Float[Tensor, " m"], base: Tensor) -> Tensor:
        """Return the weighted sum of the deltas, in the base's shape."""
        total = torch.zeros_like(self.vector).flatten()
        for place, weight in enumerate(weights):
            if float(weight):
                total += weight * unpacked(self.bits[place], total.numel())
        return (total.view(self.vector.shape) * self.vector).reshape(base.shape)


class ScaledBank(nn.Module):
    """Gains of some parts, less 1."""

    def __init__(self, members: Sequence[int], deltas: Sequence[Scaled]) -> None:
        super().__init__()
        self.members = tuple(members)
        self.gains = _kept(torch.stack([d.gain - 1 for d in deltas]))

    def at(self, place: int) -> Scaled:
        """Return one part's delta."""
        return Scaled(self.gains[place] + 1)

    def mixture(self, weights: Float[Tensor, " m"], base: Tensor) -> Tensor:
        """Return the weighted sum of the deltas, in the base's shape."""
        return (weights @ self.gains).reshape(-1, *[1] * (base.ndim - 1)) * base


Bank = LowRankBank | DenseBank | MaskedBank | ScaledBank
FORMS: dict[type, type[Bank]] = {
    LowRank: LowRankBank,
    Dense: DenseBank,
    Masked: MaskedBank,
    Scaled: ScaledBank,
}


class Banks(nn.ModuleList):
    """The banks of one tensor."""

    def __iter__(self) -> Iterator[Bank]:  # type: ignore[override]
        """Iterate over the banks."""
        return super().__iter__()  # type: ignore[return-value]


def banks(deltas: Mapping[int, Delta]) -> Banks:
    """Return the banks of one tensor's deltas, given by the number of their part."""
    kinds: dict[tuple, list[int]] = {}
    for number, delta in deltas.items():
        vector = id(delta.vector) if isinstance(delta, Masked) else 0
        kinds.setdefault((type(delta), vector), []).append(number)
    return Banks(
        FORMS[kind](members, [deltas[n] for n in members])  # type: ignore[arg-type]
        for (kind, _), members in kinds.items()
    )


def mixed(found: Banks, weights: Float[Tensor, " t"], base: Tensor) -> Tensor:
    """Return the sum of all banks' mixtures for the weights of all parts."""
    total = torch.zeros_like(base)
    for bank in found:
        total += bank.mixture(weights[list(bank.members)].to(base.dtype), base)
    return total


def by_row(found: Banks, route: Route, rows: int, base: Tensor) -> Shaped[Tensor, "b ..."]:
    """Return each row's own mixture of a small tensor."""
    total = base.new_zeros(rows, *base.shape)
    for bank in found:
        weights = route.of(rows, bank.members).to(base.dtype)
        count = len(bank.members)
        deltas = torch.stack([bank.at(i).delta(base).to(base.dtype) for i in range(count)])
        total += (weights @ deltas.flatten(1)).view(rows, *base.shape)
    return total

"""Several parts' deltas of one tensor, stacked by form, as layers mix them.

    low rank   a (m, r, c), b (m, r, R); smaller ranks are filled up with zeros
    dense      (m, ...)            masked   bits (m, n8) on one vector (...)
    scaled     gain - 1, (m, R)

m counts the parts that touch the tensor, `members` says which of all they are.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pluribus.core.shapes import Float, Shaped
from pluribus.route._adding import added
from pluribus.route._route import Route
from pluribus.route.parts import Delta, Dense, LowRank, Masked, Scaled, unpacked


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

        self.a = _kept(torch.stack([filled(d.a) for d in deltas]).contiguous())
        self.b = _kept(torch.stack([filled(d.b.t()) for d in deltas]).contiguous())

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
        """Return y + sum_t w_t b_t a_t x for all rows at once; may write into y.

        `transposed`: the tensor is (inputs, outputs), so what is added is x b_t a_t.
        """
        packed = route.packed(x.size(0), self.members)
        if packed is None:
            return y
        found = self._parameters  # as attributes they would be looked for elsewhere first
        a, b = found["a"], found["b"]
        assert a is not None
        assert b is not None
        if a.dtype is not x.dtype:
            a, b = a.to(x.dtype), b.to(x.dtype)
        return added(x, y, b, a, packed) if transposed else added(x, y, a, b, packed)


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
    total: Tensor | None = None
    for bank in found:
        weights = route.of(rows, bank.members).to(base.dtype)
        if isinstance(bank, DenseBank):
            own = weights @ bank.values.to(base.dtype).flatten(1)
        elif isinstance(bank, ScaledBank):
            gains = weights @ bank.gains.to(base.dtype)
            own = gains.view(rows, -1, *[1] * (base.ndim - 1)) * base
        else:
            count = len(bank.members)
            deltas = torch.stack([bank.at(i).delta(base).to(base.dtype) for i in range(count)])
            own = weights @ deltas.flatten(1)
        own = own.view(rows, *base.shape)
        total = own if total is None else total + own
    return base.new_zeros(rows, *base.shape) if total is None else total

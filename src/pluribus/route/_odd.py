"""Tensors of the base that no layer can mix: class tokens, tables that are read without a call.

A mixture of them stands in their places while the base runs. Rows with different mixtures run one
after another, unless a tensor for each row, put in their places, gives the same: that is tried on
the first batch that differs in them, and kept from then on (`spreads`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pluribus.core.shapes import Float
from pluribus.route._banks import Banks, by_row, mixed
from pluribus.route._batch import close
from pluribus.route._route import Route


class Odd(nn.Module):
    """The deltas of some of the base's tensors, by name."""

    def __init__(self, base: nn.Module, tables: Mapping[str, Banks]) -> None:
        super().__init__()
        self._base = [base]  # in a list: it stays the composite's child, not ours
        self.names: tuple[str, ...] = ()
        self.found = nn.ModuleList()
        self.spreads: bool | None = None  # whether each takes a row of its own; None: not tried
        self.axes = 0  # of length 1 between a row and the values of a vector
        for name, found in tables.items():
            self.add(name, found)

    def add(self, name: str, found: Banks) -> None:
        """Take one more tensor."""
        self.names = (*self.names, name)
        self.found.append(found)
        self.spreads = None

    def items(self) -> Iterator[tuple[str, Banks]]:
        """Iterate over the tensors' names and banks."""
        return zip(self.names, self.found, strict=True)  # type: ignore[arg-type]

    @property
    def members(self) -> tuple[int, ...]:
        """The parts that move any of them."""
        return tuple(sorted({m for _, found in self.items() for one in found for m in one.members}))

    def groups(self, route: Route) -> list[tuple[Tensor | None, Tensor]]:
        """Return the mixtures of them in a batch, and the rows of each."""
        return route.groups(route.rows, self.members) if self.names else []

    def standing(self, route: Route, weights: Float[Tensor, " m"] | None) -> AbstractContextManager:
        """Put one mixture into the base, and take it out again."""
        if not self.names or weights is None:
            return nullcontext()
        whole = weights.new_zeros(route.weights.shape[1])
        whole[list(self.members)] = weights

        def made(found: Banks, own: Tensor) -> Tensor:
            return own + mixed(found, whole, own)

        return self._replaced(made)

    def spread(self, route: Route) -> AbstractContextManager:
        """Put a tensor for each row into their places, and take them out again."""

        def made(found: Banks, own: Tensor) -> Tensor:
            rows = by_row(found, route, route.rows, own) + own
            if own.ndim == 1:
                return rows.view(len(rows), *[1] * self.axes, -1)
            return rows[:, 0] if own.ndim > 1 and len(own) == 1 else rows

        return self._replaced(made)

    def agrees(self, expected: Any, args: tuple, kwargs: dict[str, Any], route: Route) -> bool:
        """Whether a tensor for each row gives the outputs that are expected, in some form."""
        for self.axes in (0, 1, 2):  # (b, d), (b, 1, d) as class tokens, (b, 1, 1, d) as scales
            try:
                with torch.no_grad(), self.spread(route):
                    found = self._base[0](*args, **kwargs)
            except (RuntimeError, IndexError, ValueError):  # shapes that do not broadcast
                continue
            if close(found, expected):
                return True
        self.axes = 0
        return False

    @contextmanager
    def _replaced(self, made: Callable[[Banks, Tensor], Tensor]) -> Iterator[None]:
        before = []
        try:
            for name, found in self.items():
                places = _places(self._base[0], name)
                own = places[0][0][places[0][1]]
                instead = made(found, own.detach())
                for table, attribute in places:
                    before.append((table, attribute, own))
                    table[attribute] = instead
            yield
        finally:
            for table, attribute, own in reversed(before):
                table[attribute] = own


def _places(base: nn.Module, name: str) -> list[tuple[dict[str, Any], str]]:
    """Return all places at which a tensor of the state dict is kept."""
    wanted = base.state_dict(keep_vars=True)[name]
    return [
        (table, attribute)
        for module in base.modules()
        for table in (module._parameters, module._buffers)
        for attribute, tensor in table.items()
        if tensor is wanted
    ]

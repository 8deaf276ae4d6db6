"""One batch's mixture: how much of each part every row takes, as the layers need it.

Rows of a layer's input may outnumber the batch: beams of one prompt, or tokens that a model has
flattened. Both lie batch-major, so each row of weights is repeated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pluribus.core.errors import MismatchError, NonFiniteError
from pluribus.core.shapes import Float, Int

T = TypeVar("T")


class Packed(NamedTuple):
    """The rows that use each part, side by side: u parts in use, n places for the rows of each."""

    used: Int[Tensor, " u"]  # numbers among the members that were asked for
    table: Float[Tensor, "b u"]  # weights of the parts in use
    rows: Int[Tensor, "u n"]  # a place that nobody needs has row 0
    weights: Float[Tensor, "u n"]  # and weight 0
    plain: bool  # whether all rows have k parts, of weight 1
    slots: Int[Tensor, "b k"]  # where among the u n places a row's parts are
    parts: Int[Tensor, "b k"]  # which of the members those are


class Route:
    """Weights of the parts for each row of a batch, with what was worked out from them.

    `weights` (b, t) need not sum to 1. Raises NonFiniteError for a weight that is not finite.
    """

    def __init__(self, weights: Float[Tensor, "b t"]) -> None:
        if weights.ndim != 2:
            raise MismatchError(
                f"weights have shape {list(weights.shape)}, expected (batch, parts)"
            )
        if not bool(weights.detach().isfinite().all()):
            row = int((~weights.detach().isfinite()).any(1).nonzero()[0])
            raise NonFiniteError(f"the route of row {row} is not finite: {weights[row].tolist()}")
        self.weights = weights
        self.rows = len(weights)
        self._known: dict[tuple, Any] = {}

    def of(self, rows: int, members: tuple[int, ...]) -> Float[Tensor, "b t"]:
        """Return the weights of some parts for a layer with so many rows."""

        def made() -> Tensor:
            found = self.weights
            if members != tuple(range(found.shape[1])):
                found = found[:, list(members)]
            return found if rows == self.rows else found.repeat_interleave(self._times(rows), 0)

        return self._once(("of", rows, members), made)

    def packed(self, rows: int, members: tuple[int, ...]) -> Packed | None:
        """Return the same part by part; None if no row uses any of them."""

        def made() -> Packed | None:
            table = self.of(rows, members)
            plain = table.detach()
            used = (plain != 0).any(0).nonzero().flatten()
            if not len(used):
                return None
            table, plain = table[:, used], plain[:, used]
            parts, who = (plain.t() != 0).nonzero(as_tuple=True)
            count, columns = parts.bincount(), who.bincount(minlength=rows)
            even = int(columns.min()) == int(columns.max())
            most = int(count.max()) + (not even)  # the last place is free where some row needs one
            slot = parts * most + _within(parts, count)
            by_row = who.argsort(stable=True)
            slots = plain.new_full((rows, int(columns.max())), most - 1, dtype=torch.long)
            slots[who[by_row], _within(who[by_row], columns)] = slot[by_row]
            places = slots.new_zeros(len(used) * most)
            places[slot] = who
            weights = table.new_zeros(len(places)).index_put((slot,), table[who, parts])
            return Packed(
                used=used,
                table=table,
                rows=places.view(len(used), most),
                weights=weights.view(len(used), most),
                plain=even and bool((plain[who, parts] == 1).all()),
                slots=slots,
                parts=used[slots // most],
            )

        return self._once(("packed", rows, members), made)

    def groups(self, rows: int, members: tuple[int, ...]) -> list[tuple[Tensor | None, Tensor]]:
        """Return which rows share a mixture: (row numbers, or None for all; the mixture (t,))."""

        def made() -> list[tuple[Tensor | None, Tensor]]:
            found = self.of(rows, members)
            if not rows:
                return []
            kinds, which = torch.unique(found.detach(), dim=0, return_inverse=True)
            if len(kinds) == 1:
                return [(None, found[0])]
            places = [(which == kind).nonzero().flatten() for kind in range(len(kinds))]
            return [(place, found[place[0]]) for place in places]

        return self._once(("groups", rows, members), made)

    def _times(self, rows: int) -> int:
        if not self.rows or rows % self.rows:
            raise MismatchError(
                f"a layer was given {rows} rows, but the route is for a batch of {self.rows}; "
                "route this batch, or keep the batch as the first axis"
            )
        return rows // self.rows

    def _once(self, key: tuple, made: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = made()
        return self._known[key]


def _within(group: Tensor, sizes: Tensor) -> Tensor:
    """Return the place of each in its group; those of one group lie together, in order."""
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(group), device=group.device) - starts[group]


class Current:
    """The route that a module's layers read; None: the base as it is."""

    def __init__(self) -> None:
        self.route: Route | None = None

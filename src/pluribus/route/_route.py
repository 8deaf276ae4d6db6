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


class Sparse(NamedTuple):
    """The parts that rows use, the same number for each row; unused places weigh 0."""

    index: Int[Tensor, "b k"]
    weight: Float[Tensor, "b k"]


class Segment(NamedTuple):
    """The rows that use one part."""

    member: int
    rows: Tensor | slice
    weights: Tensor | None  # (n, 1, 1); None: all are 1
    count: int


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

    def sparse(self, rows: int, members: tuple[int, ...]) -> Sparse:
        """Return the same as the fewest columns that hold every weight that isn't 0."""

        def made() -> Sparse:
            found = self.of(rows, members)
            used = int((found.detach() != 0).sum(1).max()) if found.numel() else 0
            index = found.detach().abs().topk(used, dim=1).indices
            return Sparse(index, found.gather(1, index))

        return self._once(("sparse", rows, members), made)

    def segments(self, rows: int, members: tuple[int, ...]) -> list[Segment]:
        """Return, for each part that any row uses, those rows; a slice where they lie together."""

        def made() -> list[Segment]:
            table = self.of(rows, members)
            out = []
            for number in range(len(members)):
                column = table[:, number]
                places = column.nonzero().flatten()
                if not len(places):
                    continue
                first, last = int(places[0]), int(places[-1])
                together = last - first + 1 == len(places)
                weights = column[places]
                out.append(
                    Segment(
                        number,
                        slice(first, last + 1) if together else places,
                        None if bool((weights == 1).all()) else weights[:, None, None],
                        len(places),
                    )
                )
            return out

        return self._once(("segments", rows, members), made)

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


class Current:
    """The route that a module's layers read; None: the base as it is."""

    def __init__(self) -> None:
        self.route: Route | None = None

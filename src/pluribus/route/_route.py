"""One batch's mixture: how much of each part every row takes, as the layers need it.

Rows of a layer's input may outnumber the batch: beams of one prompt, or tokens that a model has
flattened. Both lie batch-major, so each row of weights is repeated.
"""

from collections.abc import Callable
from functools import cached_property
from math import isfinite
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.shapes import Float
from pluribus.route._packed import Packed, numbers

T = TypeVar("T")


class Route:
    """Weights of the parts for each row of a batch, with what was worked out from them.

    `weights` (b, t) need not sum to 1. Raises NonFiniteError for a weight that is not finite.
    """

    def __init__(self, weights: Float[Tensor, "b t"]) -> None:
        if weights.ndim != 2:
            raise MismatchError(
                f"weights have shape {list(weights.shape)}, expected (batch, parts)"
            )
        self._values = numbers(weights)
        if not isfinite(self._values.sum()) and not np.isfinite(self._values).all():
            row = int(np.isfinite(self._values).all(1).argmin())
            raise NonFiniteError(f"the route of row {row} is not finite: {weights[row].tolist()}")
        self.weights = weights
        self._seen = self._values.tobytes()
        self.rows = len(weights)
        self.unsure: dict[Any, tuple[bool, bool]] | None = None  # see `note`; None: not checked
        self._known: dict[tuple, Any] = {}
        self._packed: dict[tuple[int, tuple[int, ...]], Packed | None] = {}

    @cached_property
    def same(self) -> bool:
        """Whether all rows have the same mixture."""
        return bool((self._values == self._values[:1]).all())

    def note(self, site: Any, shared: bool, *, doubtful: bool) -> None:
        """Note what a site takes for granted, to be checked once the batch has run.

        Raises InputError if it is doubtful and nothing checks it. Rows of one mixture need no
        check.
        """
        if self.same:
            return
        if self.unsure is not None:
            self.unsure[site] = shared, doubtful
        elif doubtful:
            raise InputError(
                f"how rows with different mixtures go through {site.path} is not known yet; call "
                "the composite once on a batch of plain tensors, without an attention cache, or "
                "give rows of one mixture"
            )

    def serves(self, weights: Float[Tensor, "b t"]) -> bool:
        """Whether these weights are the same, so that what was worked out holds for them too."""
        own = self.weights
        return (
            weights.shape == own.shape
            and weights.dtype is own.dtype
            and weights.device == own.device
            and numbers(weights).tobytes() == self._seen
        )

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
        key = rows, members
        if key not in self._packed:
            values = self._values
            if members != tuple(range(values.shape[1])):
                values = np.ascontiguousarray(values[:, list(members)])
            if rows != self.rows:
                values = values.repeat(self._times(rows), 0)
            found = Packed(self.of(rows, members), values)
            self._packed[key] = found if found.count else None
        return self._packed[key]

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

    @property
    def copied(self) -> bool:
        """Whether some layer had to bring rows of one mixture together."""
        if any(packed is not None and packed.copied for packed in self._packed.values()):
            return True
        return any(key[0] == "groups" for key in self._known)

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

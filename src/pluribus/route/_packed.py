"""Which rows of a batch use which parts, in the forms that ways of adding the parts need."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C import _DisableFuncTorch
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)

from pluribus.core.shapes import Float, Int
from pluribus.kernels.low_rank_rows import Updates

DEAR = 3  # reading a part's factors, copying and reading the copy over reading alone


class Places(NamedTuple):
    """The rows that use each part, side by side: p parts, n places for the rows of each."""

    owners: Int[Tensor, " p"] | slice | None  # the parts that have places; None: all of them
    rows: Int[Tensor, "p n"]  # a place that nobody needs has row 0
    weights: Float[Tensor, "p n"]  # and weight 0
    slots: Int[Tensor, "b k"]  # where among the p n places a row's parts are
    parts: Int[Tensor, "b k"]  # which parts those are


class Packed:
    """A table of weights (b, m), and which of its entries are not 0."""

    def __init__(self, table: Float[Tensor, "b m"], values: np.ndarray) -> None:
        self.table, self.values = table, values
        self.batch, self.members = values.shape
        self.ways: dict[tuple, str] = {}  # which way of adding was found the quickest
        self.copied = False  # whether a layer's rows had to be brought together
        self._updates: dict[tuple[int, int], Updates] = {}

    @cached_property
    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """The parts and the rows (e,) of entries that are not 0, by part, then by row."""
        parts, rows = (self.values != 0).T.nonzero()
        return parts, rows

    @cached_property
    def count(self) -> np.ndarray:
        """How many rows use each part (m,)."""
        return np.bincount(self.entries[0], minlength=self.members)

    @cached_property
    def used(self) -> int:
        """How many parts are used."""
        return int((self.count > 0).sum())

    @cached_property
    def columns(self) -> np.ndarray:
        """How many parts each row has (b,)."""
        return np.bincount(self.entries[1], minlength=self.batch)

    @cached_property
    def even(self) -> bool:
        """Whether all rows have as many parts."""
        return bool((self.columns == self.columns[0]).all())

    @cached_property
    def plain(self) -> bool:
        """Whether all rows have as many parts, each of weight 1."""
        return self.even and bool((self.values[self.entries[::-1]] == 1).all())

    @cached_property
    def most(self) -> int:
        """How many places each part needs; the last is free if some row has fewer parts."""
        return int(self.count.max()) + (not self.even)

    @cached_property
    def chosen(self) -> np.ndarray | slice | None:
        """The parts that get places: those in use, or all (None) where that saves copies."""
        used = self.count.nonzero()[0]
        if len(used) == self.members:
            return None
        if used[-1] - used[0] < len(used):
            return slice(int(used[0]), int(used[-1]) + 1)
        return used if len(used) * DEAR < self.members else None

    @cached_property
    def filled(self) -> int:
        """How many places there are."""
        return self.most * (self.members if self.chosen is None else self.used)

    @cached_property
    def straight(self) -> bool:
        """Whether the batch's rows lie part by part already, as many of each."""
        rows = self.entries[1]
        if not len(rows) == self.batch == self.filled:
            return False
        return bool((rows == np.arange(self.batch)).all())

    @cached_property
    def in_use(self) -> tuple[Int[Tensor, " u"] | None, Float[Tensor, "b u"]]:
        """The parts that some row uses, None if all, and their columns of the table."""
        if self.used == self.members:
            return None, self.table
        used = self._moved(self.count.nonzero()[0])
        return used, self.table[:, used]

    @cached_property
    def places(self) -> Places:
        """The rows side by side, as batched products need them."""
        chosen, count, (parts, who) = self.chosen, self.count, self.entries
        own = self.table[self._moved(who), self._moved(parts)]
        if chosen is not None:
            used = count.nonzero()[0]
            parts, count = np.searchsorted(used, parts), count[used]
        slot = parts * self.most + _within(parts, count)
        by_row = who.argsort(kind="stable")
        slots = np.full((self.batch, int(self.columns.max())), self.filled - 1)
        slots[who[by_row], _within(who[by_row], self.columns)] = slot[by_row]
        rows = np.zeros(self.filled, np.int64)
        rows[slot] = who
        owners = np.arange(self.members)
        owners = owners if chosen is None else owners[chosen]
        weights = self.table.new_zeros(self.filled)
        return Places(
            owners=self._moved(owners) if isinstance(chosen, np.ndarray) else chosen,
            rows=self._moved(rows).view(len(count), self.most),
            weights=weights.index_put((self._moved(slot),), own).view(len(count), self.most),
            slots=self._moved(slots),
            parts=self._moved(owners[slots // self.most]),
        )

    def updates(self, places: int, rank: int) -> Updates:
        """Return the same as the kernel needs it; its weights know of no gradient."""
        key = places, rank
        found = self._updates.get(key)
        if found is None:
            found = self._updates[key] = Updates(self.values, places, rank)
        return found

    def _moved(self, found: np.ndarray) -> Tensor:
        return torch.from_numpy(found).to(self.table.device)


def numbers(table: Float[Tensor, "b t"]) -> np.ndarray:
    """Return a table's values as float32, whoever follows it for derivatives."""
    table = table.detach()
    if peek_interpreter_stack() is None:
        return table.float().cpu().contiguous().numpy()
    while is_functorch_wrapped_tensor(table) and not is_batchedtensor(table):
        table = get_unwrapped(table)
    with _DisableFuncTorch():
        return table.float().cpu().contiguous().numpy()


def _within(group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the place of each in its group; those of one group lie together, in order."""
    return np.arange(len(group)) - (sizes.cumsum() - sizes)[group]

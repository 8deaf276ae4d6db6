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
from torch.autograd import forward_ad

from pluribus.core.shapes import Float, Int
from pluribus.kernels.low_rank_rows import Updates, counted

DEAR = 3  # reading a part's factors, copying and reading the copy over reading alone


class Places(NamedTuple):
    """The rows that use each part, side by side: p parts, n places for the rows of each."""

    owners: Int[Tensor, " p"] | slice | None  # the parts that have places; None: all of them
    rows: Int[Tensor, "p n"]  # a place that nobody needs has row 0
    weights: Float[Tensor, "p n"]  # and weight 0
    slots: Int[Tensor, "b k"]  # where among the p n places a row's parts are
    parts: Int[Tensor, "b k"]  # which parts those are


class Packed:
    """A table of weights (b, m), some of which are not 0.

    used      how many parts some row uses           even      whether all rows have as many parts
    plain     the same, and all weights are 1,       most      how many places each part needs; the
    straight  whether the rows lie part by part                last is free unless rows are even
              already, as many of each
    """

    def __init__(self, table: Float[Tensor, "b m"], values: np.ndarray) -> None:
        self.table, self.values = table, values
        self.batch, self.members = values.shape
        self.count, self.used, most, fewest, widest, first, last, ones, down = counted(values)
        self.even = fewest == widest
        self.plain = self.even and ones and not _learns(table)
        self.most = most + (not self.even)
        self.apart = widest <= 1
        self._near = slice(first, last + 1) if last - first < self.used < self.members else None
        self._few = self.used * DEAR < self.members
        owners = self.used if self._near or self._few else self.members
        self.filled = self.most * owners
        self.straight = down and self.even and self.filled == self.batch == self.count
        self.ways: dict[tuple, str | Updates] = {}  # the quickest way of adding, for some shapes
        self.copied = False  # whether a layer's rows had to be brought together
        self._updates: dict[tuple[int, int], Updates] = {}

    @cached_property
    def runs(self) -> list[tuple[int, int, int]] | None:
        """Where the rows lie part by part: (part, first row, row behind the last); else None."""
        if not self.apart or not self.count:
            return None
        rows, parts = np.nonzero(self.values)
        starts = np.flatnonzero(np.diff(parts, prepend=-1) | (np.diff(rows, prepend=-2) != 1))
        if len(starts) != self.used:
            return None
        ends = np.append(starts[1:], len(rows)) - 1
        return list(
            zip(
                parts[starts].tolist(),
                rows[starts].tolist(),
                (rows[ends] + 1).tolist(),
                strict=True,
            )
        )

    @cached_property
    def in_use(self) -> tuple[Int[Tensor, " u"] | None, Float[Tensor, "b u"]]:
        """The parts that some row uses, None if all, and their columns of the table."""
        if self.used == self.members:
            return None, self.table
        used = self._moved(np.flatnonzero(self.values.any(0)))
        return used, self.table[:, used]

    @cached_property
    def places(self) -> Places:
        """The rows side by side, as batched products need them."""
        source, who = np.nonzero(self.values.T)
        own = self.table[self._moved(who), self._moved(source)]
        used = np.arange(self.members)
        if self._near or self._few:
            used = np.unique(source)
        parts = np.searchsorted(used, source)
        slot = parts * self.most + _within(parts, np.bincount(parts, minlength=len(used)))
        by_row = who.argsort(kind="stable")
        columns = np.bincount(who, minlength=self.batch)
        slots = np.full((self.batch, int(columns.max())), self.filled - 1)
        slots[who[by_row], _within(who[by_row], columns)] = slot[by_row]
        rows = np.zeros(self.filled, np.int64)
        rows[slot] = who
        weights = self.table.new_zeros(self.filled)
        owners = self._moved(used) if self._few else None
        return Places(
            owners=self._near or owners,
            rows=self._moved(rows).view(len(used), self.most),
            weights=weights.index_put((self._moved(slot),), own).view(len(used), self.most),
            slots=self._moved(slots),
            parts=self._moved(used[slots // self.most]),
        )

    def updates(self, places: int, rank: int) -> Updates:
        """Return the same as the kernel needs it; its weights know of no gradient."""
        key = places, rank
        if key not in self._updates:
            self._updates[key] = Updates(self.values, places, rank, self.count, self.apart)
        return self._updates[key]

    def _moved(self, found: np.ndarray) -> Tensor:
        return torch.from_numpy(found).to(self.table.device)


def _learns(table: Tensor) -> bool:
    """Whether somebody asks for derivatives by the weights."""
    return (
        table.requires_grad
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def followed() -> bool:
    """Whether operators are followed for derivatives, or mapped, at the moment."""
    return (
        torch.is_grad_enabled()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def numbers(table: Float[Tensor, "b t"]) -> np.ndarray:
    """Return a table's values as float32, whoever follows it for derivatives."""
    table = table.detach()
    if peek_interpreter_stack() is None:
        if table.dtype is not torch.float32 or not table.is_cpu:
            table = table.float().cpu()
        return table.contiguous().numpy()
    while is_functorch_wrapped_tensor(table) and not is_batchedtensor(table):
        table = get_unwrapped(table)
    with _DisableFuncTorch():
        return table.float().cpu().contiguous().numpy()


def _within(group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the place of each in its group; those of one group lie together, in order."""
    return np.arange(len(group)) - (sizes.cumsum() - sizes)[group]

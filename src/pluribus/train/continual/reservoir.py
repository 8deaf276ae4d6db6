"""Uniform samples of a stream that hold no more than so many rows, whole or by class.

Every row gets a priority from U(0, 1) as it arrives, and those with the highest stay: at any time
they are a uniform sample without replacement of all that came (Efraimidis and Spirakis 2006, with
equal weights), and stay one if the capacity shrinks. TAME (arXiv:2210.03869) keeps one such heap a
class, so that its selector sees every class as often.

Rows are kept on the CPU. Chance is an argument: the same generator gives the same rows.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Int, Shaped

Row = tuple[float, int, Tensor, int, int]  # priority, arrival, x, label, owner
Heap = list[Row]


class Kept(NamedTuple):
    """Rows of a reservoir in the order in which they arrived."""

    x: Shaped[Tensor, "b ..."]
    y: Int[Tensor, " b"]
    owner: Int[Tensor, " b"]
    arrival: Int[Tensor, " b"]  # number of the row among all that were offered


class Reservoir:
    """A uniform sample of all rows offered, at most `capacity`. Raises InputError for less than 1.

    Rows are pairs (x, label). It holds them all until it is full.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = _capacity(capacity), 0
        self._heap: Heap = []

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, x: Shaped[Tensor, "b ..."], y: Int[Tensor, " b"], rng: Generator) -> None:
        """Take rows, and let those with the lowest priorities go."""
        for row in _rows(x, y, [0] * len(y), self.seen, rng):
            _push(self._heap, row, self.capacity)
        self.seen += len(y)

    def kept(self) -> Kept:
        """Return what is held. Raises InputError if that is nothing."""
        return _stacked(self._heap)

    def copy(self) -> "Reservoir":
        """Return one that goes on from here by itself."""
        out = Reservoir(self.capacity)
        out.seen, out._heap = self.seen, list(self._heap)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        return {"capacity": self.capacity, "seen": self.seen, "rows": _packed(self._heap)}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Reservoir":
        """Return the reservoir of a state."""
        out = cls(state["capacity"])
        out.seen, out._heap = state["seen"], _unpacked(state["rows"])
        return out


class ClassReservoir:
    """A uniform sample of the rows of each class, at most `capacity` together.

    A class holds at most capacity // classes rows; without `classes` that is the number of those
    seen so far, and each gives way as new ones come. Rows have an owner beside their label (with
    TAME the expert that was current). Raises InputError for a capacity of less than 1 or less than
    the number of classes.
    """

    def __init__(self, capacity: int, classes: int | None = None) -> None:
        self.capacity, self.classes, self.seen = _capacity(capacity), classes, 0
        if classes is not None and not 1 <= classes <= capacity:
            raise InputError(
                f"a buffer of {capacity} rows for {classes} classes: give 1 row a class or more"
            )
        self._heaps: dict[int, Heap] = {}

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    @property
    def share(self) -> int:
        """The rows a class may hold."""
        return self.capacity // (self.classes or max(len(self._heaps), 1))

    def counts(self) -> dict[int, int]:
        """Return how many rows of each class are held."""
        return {key: len(heap) for key, heap in sorted(self._heaps.items())}

    def offer(
        self,
        x: Shaped[Tensor, "b ..."],
        y: Int[Tensor, " b"],
        owner: int,
        classes: Sequence[int],
        rng: Generator,
    ) -> None:
        """Take rows of these classes.

        Raises InputError, with nothing taken, if there would be more classes than the buffer has
        rows or than were announced.
        """
        known = self._heaps.keys() | set(classes)
        if len(known) > self.capacity:
            raise InputError(
                f"a buffer of {self.capacity} rows cannot hold one of each of {len(known)} "
                "classes; give a larger buffer, or fewer experts"
            )
        if self.classes is not None and len(known) > self.classes:
            raise InputError(
                f"{len(known)} classes were seen, but {self.classes} were announced; give the "
                "number of all classes, or none to share the buffer between those seen"
            )
        rows = _rows(x, y, [owner] * len(y), self.seen, rng)
        for key in classes:
            self._heaps.setdefault(key, [])
        for key, row in zip(classes, rows, strict=True):
            heapq.heappush(self._heaps[key], row)
        self._trim()
        self.seen += len(y)

    def reassigned(
        self, owner_of: Callable[[Row], int], class_of: Callable[[int, int, int], int]
    ) -> "ClassReservoir":
        """Return one with other owners; `class_of(class, label, owner)` names the class anew."""
        out = ClassReservoir(self.capacity, self.classes)
        out.seen = self.seen
        for key, heap in self._heaps.items():
            for row in heap:
                owner = owner_of(row)
                heap = out._heaps.setdefault(class_of(key, row[3], owner), [])
                heapq.heappush(heap, (*row[:4], owner))
        out._trim()
        return out

    def kept(self) -> Kept:
        """Return what is held. Raises InputError if that is nothing."""
        return _stacked([row for heap in self._heaps.values() for row in heap])

    def copy(self) -> "ClassReservoir":
        """Return one that goes on from here by itself."""
        out = ClassReservoir(self.capacity, self.classes)
        out.seen = self.seen
        out._heaps = {key: list(heap) for key, heap in self._heaps.items()}
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        return {
            "capacity": self.capacity,
            "classes": self.classes,
            "seen": self.seen,
            "rows": {key: _packed(heap) for key, heap in self._heaps.items()},
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "ClassReservoir":
        """Return the reservoir of a state."""
        out = cls(state["capacity"], state["classes"])
        out.seen = state["seen"]
        out._heaps = {key: _unpacked(rows) for key, rows in state["rows"].items()}
        return out

    def _trim(self) -> None:
        for heap in self._heaps.values():
            while len(heap) > self.share:
                heapq.heappop(heap)


def _capacity(capacity: int) -> int:
    if capacity < 1:
        raise InputError(f"capacity = {capacity!r}: a reservoir holds 1 row or more")
    return capacity


def _rows(x: Tensor, y: Tensor, owners: Sequence[int], seen: int, rng: Generator) -> list[Row]:
    drawn = torch.rand(len(y), dtype=torch.float64, generator=rng).tolist()
    own = [row.clone() for row in x.detach().cpu()]  # a view would keep its whole batch
    parts = zip(drawn, own, y.tolist(), owners, strict=True)
    return [(p, seen + i, row, label, owner) for i, (p, row, label, owner) in enumerate(parts)]


def _push(heap: Heap, row: Row, most: int) -> None:
    heapq.heappush(heap, row)
    while len(heap) > most:
        heapq.heappop(heap)


def _stacked(heap: Heap) -> Kept:
    if not heap:
        raise InputError("the reservoir is empty: offer rows first")
    rows = sorted(heap, key=lambda row: row[1])
    return Kept(
        torch.stack([row[2] for row in rows]),
        torch.tensor([row[3] for row in rows]),
        torch.tensor([row[4] for row in rows]),
        torch.tensor([row[1] for row in rows]),
    )


def _packed(heap: Heap) -> dict[str, Tensor]:
    """Return a heap as it lies, so that it goes on in the same way."""
    if not heap:
        return {}
    return {
        "priority": torch.tensor([row[0] for row in heap], dtype=torch.float64),
        "whole": torch.tensor([(row[1], *row[3:]) for row in heap]),
        "x": torch.stack([row[2] for row in heap]),
    }


def _unpacked(rows: dict[str, Tensor]) -> Heap:
    if not rows:
        return []
    parts = zip(rows["priority"].tolist(), rows["whole"].tolist(), rows["x"], strict=True)
    return [(p, arrival, x.clone(), y, owner) for p, (arrival, y, owner), x in parts]

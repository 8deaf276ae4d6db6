"""Points of a space as places in the unit cube, for algorithms that know numbers only."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from pluribus.search._pyglove import pg


class Cube:
    """Coordinates in [0, 1] for every decision of a space, active or not."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self._first: dict[str, int] = {}
        self._size = 0
        for point in spec.decision_points:
            if getattr(point, "is_subchoice", False) and point.subchoice_index:
                continue  # the first of the k subchoices stands for all
            self._first[_name(point)] = self._size
            self._size += _width(point)

    def __len__(self) -> int:
        """Return the number of coordinates."""
        return self._size

    def point(self, place: Sequence[float]) -> Any:
        """Return the point (a `pg.DNA`) at a place."""

        def decide(point: Any) -> Any:
            first = self._first[_name(point)]
            return _decision(point, [float(x) for x in place[first : first + _width(point)]])

        return pg.DNA.from_fn(self.spec, decide).use_spec(self.spec)

    def place(self, dna: Any) -> list[float]:
        """Return a place that `point` takes to this point; inactive choices lie in the middle."""
        place = [0.5] * self._size
        chosen = dna.to_dict(key_type="dna_spec", multi_choice_key="parent")
        for point, value in chosen.items():
            first = self._first[_name(point)]
            place[first : first + _width(point)] = _coordinates(point, value)
        return place


def _name(point: Any) -> str:
    """Name a decision; subchoices of one choice share theirs."""
    if getattr(point, "is_subchoice", False):
        return str(point.parent_spec.id)
    return str(point.id)


def _whole(point: Any) -> Any:
    return point.parent_spec if getattr(point, "is_subchoice", False) else point


def _ordered(point: Any) -> bool:
    """Whether the candidates are numbers in order, so that neighbours are alike."""
    values = point.literal_values or []
    if len(values) != len(point.candidates) or not all(isinstance(v, Real) for v in values):
        return False
    return list(values) in (sorted(values), sorted(values, reverse=True))


def _width(point: Any) -> int:
    point = _whole(point)
    if isinstance(point, pg.geno.Float):
        return 1
    count = len(point.candidates)
    if point.num_choices == 1:
        return 1 if count <= 2 or _ordered(point) else count
    return count if point.distinct else count * point.num_choices


def _decision(point: Any, x: list[float]) -> Any:
    if isinstance(point, pg.geno.Float):
        return _from_unit(point, x[0])
    count = len(point.candidates)
    if point.num_choices == 1:
        if len(x) == 1:
            return [min(int(x[0] * count), count - 1)]
        return [_largest(x, 1)[0]]
    if point.distinct:
        picked = _largest(x, point.num_choices)
    else:
        rows = [x[i * count : (i + 1) * count] for i in range(point.num_choices)]
        picked = [_largest(row, 1)[0] for row in rows]
    return sorted(picked) if point.sorted else picked


def _largest(x: list[float], k: int) -> list[int]:
    """Return the numbers of the k largest, the largest first; of equals the earlier one."""
    return sorted(range(len(x)), key=lambda i: (-x[i], i))[:k]


def _coordinates(point: Any, value: Any) -> list[float]:
    if isinstance(point, pg.geno.Float):
        return [_to_unit(point, value)]
    point = _whole(point)
    count, width = len(point.candidates), _width(point)
    chosen = value if isinstance(value, list) else [value]
    if width == 1:
        return [(chosen[0] + 0.5) / count]
    x = [0.25] * width
    for rank, index in enumerate(chosen):
        at = index if point.num_choices == 1 or point.distinct else rank * count + index
        x[at] = 0.75 - 0.2 * rank / len(chosen)  # earlier choices are larger: their order counts
    return x


def _from_unit(point: Any, x: float) -> float:
    low, high = point.min_value, point.max_value
    if point.scale == "log":
        value = low * (high / low) ** x
    elif point.scale == "rlog":
        value = high + low - low * (high / low) ** (1 - x)
    else:
        value = low + (high - low) * x
    return min(max(value, low), high)


def _to_unit(point: Any, value: float) -> float:
    low, high = point.min_value, point.max_value
    if low == high:
        return 0.5
    if point.scale == "log":
        return math.log(value / low) / math.log(high / low)
    if point.scale == "rlog":
        return 1 - math.log((high + low - value) / low) / math.log(high / low)
    return (value - low) / (high - low)

"""Folds: what a merger must know about a whole tensor or model before it treats a block.

A fold is a monoid over the stream of blocks: `init`, `update` with one block's values, `join` two
partial states, `finish`. The driver runs it in an earlier pass, in any order, on any number of
threads or machines, and hands the result to the merger by name. `finish` may return another fold:
then the values are streamed once more (an exact quantile takes two or three passes).

Results never depend on the order of updates: counts are whole numbers, and partial sums are kept by
block and added in the blocks' order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pluribus.core.arrays import Array, is_torch, namespace
from pluribus.core.merger import At, Scope, accepted, fused_values

Values = Callable[..., Array]  # (base, experts, *, at, **folded) -> (t, n) or (1, n)


@runtime_checkable
class Fold(Protocol):
    """What the driver needs of a fold. `of` picks the values from a block."""

    of: Values
    scope: Scope

    def init(self) -> Any:
        """Return the empty state."""
        ...

    def update(self, state: Any, values: Array, at: At) -> Any:
        """Return the state with one block's values taken in; may change `state`."""
        ...

    def join(self, one: Any, other: Any) -> Any:
        """Return the state of two disjoint sets of blocks; may change `one`."""
        ...

    def finish(self, state: Any) -> Any:
        """Return the result, or a further fold to run over the same values."""
        ...


# -- what folds look at ----------------------------------------------------------------------------


def deltas(base: Array, experts: Array) -> Array:
    """Task vectors: experts - base, (t, n)."""
    return experts - base


def magnitudes(base: Array, experts: Array) -> Array:
    """Absolute task vectors, (t, n)."""
    return abs(experts - base)


def models(base: Array | None, experts: Array) -> Array:
    """The experts themselves, (t, n)."""
    return experts


def with_base(base: Array, experts: Array) -> Array:
    """The base, then the experts, (1 + t, n)."""
    xp = namespace(experts)
    return xp.concat([base[None], experts])


def vectors(base: Array | None, experts: Array) -> Array:
    """Task vectors where there is a base, else the experts themselves, (t, n)."""
    return experts if base is None else experts - base


class Summed(NamedTuple):
    """The sums of a block's rows, where a kernel found them without making the values."""

    rows: np.ndarray  # (t,) float64


# -- feeding ---------------------------------------------------------------------------------------

# (state, base, experts, at, folded) -> state, for blocks that kernels take
Feeder = Callable[[Any, Any, Any, At, Mapping[str, Any]], Any]


def feeder(fold: Fold, method: Any = None, name: str = "") -> Feeder | None:
    """Return what takes whole blocks into a fold by a kernel, the method's or the fold's own."""
    found = None if method is None else fused_values(method, name)
    if found is not None:
        kernel = found

        def by_method(
            state: Any,
            base: np.ndarray | None,
            experts: np.ndarray,
            at: At,
            folded: Mapping[str, Any],
        ) -> Any:
            return fold.update(state, kernel(method, base, experts, at=at, **folded), at)

        return by_method
    own = getattr(fold, "feeder", None)
    return None if own is None else own()


def feed(
    fold: Fold,
    state: Any,
    base: Array | None,
    experts: Array,
    at: At,
    folded: Mapping[str, Any],
    method: Any = None,
    name: str = "",
) -> Any:
    """Return the state of a fold with one block taken in, by a kernel where there is one.

    Blocks are arrays of working precision; only a kernel takes packed ones.
    """
    if isinstance(experts, np.ndarray) and experts.dtype != np.float64:
        quick = feeder(fold, method, name)
        if quick is not None:
            return quick(state, base, experts, at, folded)
    return fold.update(state, looked_at(fold, base, experts, at, folded), at)


def looked_at(
    fold: Fold, base: Array | None, experts: Array, at: At, folded: Mapping[str, Any]
) -> Array:
    """Return the values a fold looks at in one block, by the readable way."""
    return fold.of(base, experts, **accepted(fold.of, {"at": at, **folded}))


def rows_of(values: Array) -> list[np.ndarray]:
    """Return the rows of (t, ...) values as flat numpy vectors."""
    flat: Any = values.reshape(values.shape[0], -1)
    if is_torch(flat):
        flat = flat.detach().cpu().numpy()
    return [np.ascontiguousarray(row) for row in flat]


# -- sums ------------------------------------------------------------------------------------------


class Parts(dict[tuple[int, int], np.ndarray]):
    """Partial sums by block; added in the order of blocks."""

    def total(self) -> np.ndarray:
        """Return the sum of all parts, added in the order of blocks."""
        out = None
        for order in sorted(self):
            out = self[order].copy() if out is None else out + self[order]
        return np.zeros(0) if out is None else out


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Sum of the values of each row, in float64: (t,)."""

    of: Values
    scope: Scope = "tensor"

    def init(self) -> Parts:
        """See `Fold`."""
        return Parts()

    def update(self, state: Parts, values: Array | Summed, at: At) -> Parts:
        """See `Fold`."""
        from pluribus.kernels.fold import total

        if isinstance(values, Summed):
            state[at.order] = values.rows
        else:
            state[at.order] = np.array([total(row) for row in rows_of(values)])
        return state

    def feeder(self) -> Feeder | None:
        """Return what sums the absolute updates of whole blocks."""
        return self._magnitudes if self.of is magnitudes else None

    def _magnitudes(
        self,
        state: Parts,
        base: np.ndarray | None,
        experts: np.ndarray,
        at: At,
        folded: Mapping[str, Any],
    ) -> Parts:
        from pluribus.kernels.fold import magnitude_sums

        assert base is not None
        flat = experts.reshape(experts.shape[0], -1)
        state[at.order] = np.empty(flat.shape[0])
        magnitude_sums(base.reshape(-1), flat, state[at.order])
        return state

    def join(self, one: Parts, other: Parts) -> Parts:
        """See `Fold`."""
        one.update(other)
        return one

    def finish(self, state: Parts) -> np.ndarray:
        """Return the sums."""
        return state.total()


@dataclass(frozen=True, kw_only=True)
class Gram(Sum):
    """Inner products between rows, in float64: (t, t). Its diagonal holds squared norms."""

    def update(self, state: Parts, values: Array, at: At) -> Parts:
        """See `Fold`."""
        from pluribus.kernels.fold import dot

        rows = rows_of(values)
        part = np.zeros((len(rows), len(rows)))
        for i, x in enumerate(rows):
            for j in range(i + 1):
                part[i, j] = part[j, i] = dot(x, rows[j])
        state[at.order] = part
        return state

    def feeder(self) -> Feeder | None:
        """Return what multiplies the rows of whole blocks."""
        known = (deltas, models, with_base, vectors)
        return self._products if any(self.of is one for one in known) else None

    def _products(
        self,
        state: Parts,
        base: np.ndarray | None,
        experts: np.ndarray,
        at: At,
        folded: Mapping[str, Any],
    ) -> Parts:
        from pluribus.kernels.fold import gram

        flat = experts.reshape(experts.shape[0], -1)
        minus = self.of is deltas or (self.of is vectors and base is not None)
        first = self.of is with_base
        rows = flat.shape[0] + first
        state[at.order] = np.empty((rows, rows))
        unused = flat[0] if base is None else base.reshape(-1)
        gram(unused, flat, minus, first, state[at.order])
        return state


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """Smallest and largest value of each row: (2, t)."""

    of: Values
    scope: Scope = "tensor"

    def init(self) -> list[np.ndarray]:
        """See `Fold`."""
        return []

    def update(self, state: list[np.ndarray], values: Array, at: At) -> list[np.ndarray]:
        """See `Fold`."""
        rows = [row for row in rows_of(values) if row.size]
        if not rows:
            return state
        found = np.array([[row.min() for row in rows], [row.max() for row in rows]])
        return self.join(state, [found])

    def join(self, one: list[np.ndarray], other: list[np.ndarray]) -> list[np.ndarray]:
        """See `Fold`."""
        if not one or not other:
            return one or other
        low, high = np.minimum(one[0][0], other[0][0]), np.maximum(one[0][1], other[0][1])
        return [np.stack([low, high])]

    def finish(self, state: list[np.ndarray]) -> np.ndarray:
        """Return minima and maxima."""
        return state[0] if state else np.zeros((2, 0))

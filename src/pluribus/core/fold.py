"""Folds: what a merger must know about a whole tensor or model before it treats a block.

A fold is a monoid over the stream of blocks: `init`, `update` with one block's values, `join` two
partial states, `finish`. The driver runs it in an earlier pass, in any order, on any number of
threads or machines, and hands the result to the merger by name. `finish` may return another fold:
then the values are streamed once more (an exact quantile takes two or three passes).

Results never depend on the order of updates: counts are whole numbers, and partial sums are kept by
block and added in the blocks' order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from pluribus.core.arrays import Array, is_torch, like, per_expert
from pluribus.core.merger import At, PerExpert, Scope, accepted, fused_values

Values = Callable[..., Array]  # (base, experts, *, at, **folded) -> (t, n) or (1, n)
SMALL = 1 << 17  # up to so many elements are kept and selected from directly
HELD = 1 << 24  # values set aside at most, so that memory does not grow with a tensor


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


def deltas(base: Array, experts: Array) -> Array:
    """Task vectors: experts - base, (t, n)."""
    return experts - base


def magnitudes(base: Array, experts: Array) -> Array:
    """Absolute task vectors, (t, n)."""
    return abs(experts - base)


class Summed(NamedTuple):
    """The sums of a block's rows, where a kernel found them without making the values."""

    rows: np.ndarray  # (t,) float64


def values_of(
    fold: Fold,
    base: Array | None,
    experts: Array,
    at: At,
    folded: Any,
    method: Any = None,
    name: str = "",
) -> Any:
    """Return the values a fold looks at in one block.

    With the method and the fold's name, by the method's kernel where it has one for them.
    """
    if method is not None and (quick := fused_values(method, experts)) is not None:
        values = quick(method, name, base, experts, at=at, **folded)
        if values is not None:
            return values
    return fold.of(base, experts, **accepted(fold.of, {"at": at, **folded}))


def _rows(values: Array) -> list[np.ndarray]:
    """Return the rows of (t, ...) values as flat numpy vectors."""
    flat: Any = values.reshape(values.shape[0], -1)
    if is_torch(flat):
        flat = flat.detach().cpu().numpy()
    return [np.ascontiguousarray(row) for row in flat]


# -- sums ------------------------------------------------------------------------------------------


class _Parts(dict[tuple[int, int], np.ndarray]):
    """Partial sums by block; added in the order of blocks."""

    def total(self) -> np.ndarray:
        out = None
        for order in sorted(self):
            out = self[order].copy() if out is None else out + self[order]
        return np.zeros(0) if out is None else out


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Sum of the values of each row, in float64: (t,)."""

    of: Values
    scope: Scope = "tensor"

    def init(self) -> _Parts:
        """See `Fold`."""
        return _Parts()

    def update(self, state: _Parts, values: Array | Summed, at: At) -> _Parts:
        """See `Fold`."""
        from pluribus.kernels.fold import total

        if isinstance(values, Summed):
            state[at.order] = values.rows
        else:
            state[at.order] = np.array([total(row) for row in _rows(values)])
        return state

    def join(self, one: _Parts, other: _Parts) -> _Parts:
        """See `Fold`."""
        one.update(other)
        return one

    def finish(self, state: _Parts) -> np.ndarray:
        """Return the sums."""
        return state.total()


@dataclass(frozen=True, kw_only=True)
class Gram(Sum):
    """Inner products between rows, in float64: (t, t). Its diagonal holds squared norms."""

    def update(self, state: _Parts, values: Array, at: At) -> _Parts:
        """See `Fold`."""
        from pluribus.kernels.fold import dot

        rows = _rows(values)
        part = np.zeros((len(rows), len(rows)))
        for i, x in enumerate(rows):
            for j in range(i + 1):
                part[i, j] = part[j, i] = dot(x, rows[j])
        state[at.order] = part
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
        rows = [row for row in _rows(values) if row.size]
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


# -- exact order statistics ------------------------------------------------------------------------

Ranks = Callable[[int, int], np.ndarray]  # (elements, rows) -> (t, k) 1-based ranks, largest first


class Ranked(NamedTuple):
    """Exact order statistics of each row."""

    values: np.ndarray  # (t, k): the values at the ranks asked for
    ranks: np.ndarray  # (t, k): those ranks, 1-based from the largest
    above: np.ndarray  # (t, k): how many elements are strictly larger
    equal: np.ndarray  # (t, k): how many are equal
    size: int  # elements in a row
    ties: dict[tuple[int, int], np.ndarray] | None = None  # (t, k) equal ones by block, if known


@dataclass
class _Window:
    """Digits among which a sample expects each rank, and every value seen there, by block."""

    low: np.ndarray  # (t, k)
    high: np.ndarray  # (t, k)
    seen: dict[tuple[int, int], list[list[np.ndarray]]] = field(default_factory=dict)
    held: int = 0  # values in `seen`


@dataclass
class _Digits:
    """State of one radix pass: small inputs whole, larger ones as counts of 16-bit digits."""

    size: int = 0
    kept: dict[tuple[int, int], np.ndarray] | None = field(default_factory=dict)  # while small
    counts: np.ndarray | None = None  # (t, k, 65536)
    width: int = 32
    windows: list[_Window] | None = None  # None: the guess was given up


@dataclass(frozen=True, kw_only=True)
class Order:
    """Values at given ranks of each row, exact, by radix selection over the float bits.

    The bits of non-negative floats sort as the floats do (negative ones once flipped), so counting
    the top 16 bits finds the bin of each rank, and counting the next 16 inside that bin finds the
    value. `ranks(elements, rows)` gives (t, k) ranks from 1, the largest.
    """

    of: Values
    ranks: Ranks
    scope: Scope = "tensor"
    signed: bool = False  # False promises that no value is negative
    found: "tuple[np.ndarray, np.ndarray, int] | None" = None  # prefixes, above, digits known

    def init(self) -> _Digits:
        """See `Fold`."""
        return _Digits() if self.found is None else _Digits(kept=None)

    def update(self, state: _Digits, values: Array, at: At) -> _Digits:
        """See `Fold`."""
        rows = _rows(values)
        state.width = rows[0].dtype.itemsize * 8
        state.size += rows[0].size
        if state.kept is not None and state.size <= SMALL:
            state.kept[at.order] = np.stack(rows)
            return state
        if state.kept is not None:
            self._spill(state, np.stack(rows), at.size)
        elif state.counts is None:
            state.counts = self._zeros(len(rows))
        self._count(state, rows, at.order)
        return state

    def join(self, one: _Digits, other: _Digits) -> _Digits:
        """See `Fold`."""
        if one.size == 0:
            return other
        if other.size == 0:
            return one
        one.size += other.size
        if one.kept is not None and other.kept is not None and one.size <= SMALL:
            one.kept |= other.kept
            return one
        for state in (one, other):
            if state.kept is not None:
                first = next(iter(state.kept.values()))
                self._spill(state, first, 0)
        assert one.counts is not None
        assert other.counts is not None
        one.counts += other.counts
        if one.windows is None or other.windows is None:
            one.windows = None
        else:
            both = [*one.windows, *other.windows]
            one.windows = both if sum(window.held for window in both) <= HELD else None
        return one

    def finish(self, state: _Digits) -> "Ranked | Order":
        """Return the order statistics, or the fold that counts the next digit."""
        if state.size == 0:
            none = np.zeros((1, 1), np.int64)
            return Ranked(none.astype(np.float32), none, none, none, 0)
        if state.kept is not None:
            return self._direct(state)
        counts = state.counts
        assert counts is not None
        t = counts.shape[0]
        ranks = self.ranks(state.size, t)
        k = ranks.shape[1]
        if self.found is None:
            counts = np.broadcast_to(counts, (t, k, counts.shape[2]))
            prefixes, above, known = np.zeros((t, k), np.uint64), np.zeros((t, k), np.int64), 0
        else:
            prefixes, above, known = self.found
        prefixes_before = prefixes
        prefixes, above = prefixes.copy(), above.copy()
        equal = np.zeros((t, k), np.int64)
        for i, j in np.ndindex(t, k):
            shared = next(jj for jj in range(k) if prefixes_before[i, jj] == prefixes_before[i, j])
            falling = counts[i, shared, ::-1]
            upto = above[i, j] + np.cumsum(falling)
            at = int(np.searchsorted(upto, ranks[i, j], side="left"))
            above[i, j] = upto[at] - falling[at]
            equal[i, j] = falling[at]
            prefixes[i, j] = (int(prefixes[i, j]) << 16) | (65535 - at)
        known += 1
        if known * 16 == state.width:
            return Ranked(self._unkey(prefixes, state.width), ranks, above, equal, state.size)
        if known == 1 and self._guessed(state, prefixes):
            return self._from_windows(state, prefixes, above, ranks)
        return replace(self, found=(prefixes, above, known))

    def _direct(self, state: _Digits) -> Ranked:
        blocks = state.kept or {(0, 0): np.zeros((0, 0), np.float32)}
        rows = np.concatenate([blocks[order] for order in sorted(blocks)], axis=1)
        ranks = self.ranks(state.size, rows.shape[0])
        values = np.empty(ranks.shape, rows.dtype)
        for i, row in enumerate(rows):
            wanted = row.size - ranks[i]
            values[i] = np.partition(row, wanted)[wanted] if row.size else 0
        above = (rows[:, None, :] > values[:, :, None]).sum(2)
        equal = (rows[:, None, :] == values[:, :, None]).sum(2)
        ties = {order: (blocks[order][:, None, :] == values[:, :, None]).sum(2) for order in blocks}
        return Ranked(values, ranks, above, equal, state.size, ties)

    # Counting two digits would take two passes over the data. Most tensors need one: the first
    # block predicts the top digit of each rank to within a few, and all values that have such a
    # digit are kept aside, so that the exact value is found among them without reading again.

    def _zeros(self, rows: int) -> np.ndarray:
        k = 1 if self.found is None else self.found[0].shape[1]
        return np.zeros((rows, k, 65536), np.int64)

    def _spill(self, state: _Digits, sample: np.ndarray, size: int) -> None:
        """Turn kept blocks into counts, and predict the ranks' digits from a sample.

        Without the tensor's `size` the ranks can't be placed, and nothing is predicted.
        """
        state.counts = self._zeros(sample.shape[0])
        if self.scope == "tensor" and state.width == 32 and size:
            state.windows = [self._window(sample, size)]
        kept, state.kept = state.kept, None
        for order, block in (kept or {}).items():
            self._count(state, list(block), order)

    def _window(self, sample: np.ndarray, size: int) -> _Window:
        t, n = sample.shape
        stride = max(1, n // 16384)
        picked = np.ascontiguousarray(sample[:, ::stride])
        m = picked.shape[1]
        shares = np.clip(self.ranks(size, t) / size, 0, 1)
        slack = 4 * np.sqrt(shares * (1 - shares) / m) + 2 / m
        keys = np.sort(self._key(picked), axis=1)
        low, high = np.empty(shares.shape, np.uint32), np.empty(shares.shape, np.uint32)
        for i, j in np.ndindex(*shares.shape):
            down = int(np.clip((1 - shares[i, j] - slack[i, j]) * m, 0, m - 1))
            up = int(np.clip((1 - shares[i, j] + slack[i, j]) * m, 0, m - 1))
            low[i, j], high[i, j] = keys[i, down] >> 16, keys[i, up] >> 16
        return _Window(low, high)

    def _key(self, rows: np.ndarray) -> np.ndarray:
        bits = rows.view(np.uint32)
        if not self.signed:
            return bits
        top = np.uint32(1 << 31)
        return np.where(bits == top, top, np.where(bits & top, ~bits, bits | top))

    def _guessed(self, state: _Digits, prefixes: np.ndarray) -> bool:
        return state.windows is not None and all(
            bool(((window.low <= prefixes) & (prefixes <= window.high)).all())
            for window in state.windows
        )

    def _from_windows(
        self, state: _Digits, prefixes: np.ndarray, above: np.ndarray, ranks: np.ndarray
    ) -> Ranked:
        from pluribus.kernels.fold import digits32

        word = np.uint32
        seen: dict[tuple[int, int], list[list[np.ndarray]]] = {}
        for window in state.windows or []:
            seen |= window.seen
        keys = np.zeros(prefixes.shape, np.uint64)
        above, equal = above.copy(), np.zeros(prefixes.shape, np.int64)
        ties = {order: np.zeros(prefixes.shape, np.int64) for order in seen}
        for i, j in np.ndindex(*prefixes.shape):
            found = {order: cells[i][j] for order, cells in seen.items()}
            inside = {
                order: cell[(cell >> np.uint32(16)) == np.uint32(prefixes[i, j])]
                for order, cell in found.items()
            }
            low = np.zeros(65536, np.int64)
            for cell in inside.values():
                digits32(cell, False, False, word(0), word(31), word(0), low)
            upto = np.cumsum(low[::-1])
            at = int(np.searchsorted(upto, ranks[i, j] - above[i, j], side="left"))
            key = np.uint32((int(prefixes[i, j]) << 16) | (65535 - at))
            keys[i, j] = key
            above[i, j] += int(upto[at] - low[65535 - at])
            equal[i, j] = int(low[65535 - at])
            for order, cell in inside.items():
                ties[order][i, j] = np.count_nonzero(cell == key)
        return Ranked(self._unkey(keys, 32), ranks, above, equal, state.size, ties)

    def _count(self, state: _Digits, rows: list[np.ndarray], order: tuple[int, int]) -> None:
        from pluribus.kernels.fold import digits32, digits64

        width = rows[0].dtype.itemsize * 8
        word = np.uint32 if width == 32 else np.uint64
        count = digits32 if width == 32 else digits64
        assert state.counts is not None
        if state.windows is not None:
            self._collect(state, rows, order)
            return
        known = 0 if self.found is None else self.found[2]
        shift = word(width - 16 * (known + 1))
        above = word(min(width - 16 * known, width - 1))
        for i, row in enumerate(rows):
            bits = row.view(word)
            done: dict[int, int] = {}
            for j in range(state.counts.shape[1]):
                prefix = 0 if self.found is None else int(self.found[0][i, j])
                if prefix in done:  # several ranks fall into one bin: it is counted once,
                    continue  # and shared below
                done[prefix] = j
                count(bits, self.signed, known > 0, word(prefix), above, shift, state.counts[i, j])

    def _collect(self, state: _Digits, rows: list[np.ndarray], order: tuple[int, int]) -> None:
        from pluribus.kernels.fold import within32

        assert state.windows is not None
        assert state.counts is not None
        window = state.windows[-1]
        scratch = np.empty(rows[0].size + 1, np.uint32)
        uncounted = np.zeros(0, np.int64)
        cells: list[list[np.ndarray]] = []
        for i, row in enumerate(rows):
            cells.append([])
            for j in range(window.low.shape[1]):
                low, high = window.low[i, j], window.high[i, j]
                counts = uncounted if j else state.counts[i, 0]
                n = int(within32(row.view(np.uint32), self.signed, low, high, counts, scratch))
                cells[i].append(scratch[:n].copy())
                window.held += n
        window.seen[order] = cells
        if window.held > max(state.size * len(rows) // 4, SMALL):
            state.windows = None  # the values crowd together: counting again is cheaper

    def _unkey(self, keys: np.ndarray, width: int) -> np.ndarray:
        word, real = (np.uint32, np.float32) if width == 32 else (np.uint64, np.float64)
        bits = keys.astype(word)
        if self.signed:
            top = word(1 << (width - 1))
            bits = np.where(bits & top, bits & ~top, ~bits)
        return np.ascontiguousarray(bits).view(real)


@dataclass(frozen=True, kw_only=True)
class Ties:
    """How many elements equal the cut in each block, so that ties are broken by position."""

    of: Values
    scope: Scope
    ranked: Ranked

    def init(self) -> _Parts:
        """See `Fold`."""
        return _Parts()

    def update(self, state: _Parts, values: Array, at: At) -> _Parts:
        """See `Fold`."""
        cuts = self.ranked.values
        rows = _rows(values)
        state[at.order] = np.array(
            [[np.count_nonzero(row == cut) for cut in cuts[i]] for i, row in enumerate(rows)]
        )
        return state

    def join(self, one: _Parts, other: _Parts) -> _Parts:
        """See `Fold`."""
        one.update(other)
        return one

    def finish(self, state: _Parts) -> "Selection":
        """Return the selection with the number of ties before each block."""
        return Selection.of(self.ranked, state)


class Selection(NamedTuple):
    """Exactly `ranks[i, j]` largest elements of row i; equal ones by position, first come."""

    ranked: Ranked
    before: dict[tuple[int, int], np.ndarray] | None  # ties in earlier blocks, None if all are in

    @classmethod
    def of(cls, ranked: Ranked, ties: Mapping[tuple[int, int], np.ndarray]) -> "Selection":
        """Build a selection from the number of ties in each block."""
        before, seen = {}, np.zeros(ranked.values.shape, np.int64)
        for order in sorted(ties):
            before[order] = seen.copy()
            seen += ties[order]
        return cls(ranked._replace(ties=None), before)

    def cut(self, j: int = 0) -> np.ndarray:
        """Smallest value kept by each row, (t,); infinite where nothing is kept."""
        return np.where(self.ranked.ranks[:, j] > 0, self.ranked.values[:, j], np.inf)

    def spare(self, at: At, j: int = 0) -> np.ndarray:
        """How many elements equal to the cut this block may still keep, (t,)."""
        quota = self.ranked.ranks[:, j] - self.ranked.above[:, j]
        if self.before is None:
            return np.full(quota.shape, np.iinfo(np.int64).max)
        return np.maximum(quota - self.before[at.order][:, j], 0)

    def mask(self, values: Array, at: At, j: int = 0) -> Array:
        """Return which of a block's `values` (t, n) belong to the largest, as booleans."""
        cut = like(self.cut(j), values).reshape(-1, *(1,) * (values.ndim - 1))
        if self.before is None:
            return values >= cut
        spare = self.spare(at, j)
        keep: Any = values > cut
        tied: Any = values == cut
        for i in range(values.shape[0]):
            if spare[i] > 0:
                row = tied[i].reshape(-1)
                first = row.cumsum(0) <= int(spare[i])
                keep[i] |= (row & first).reshape(tied[i].shape)
        return keep


@dataclass(frozen=True, kw_only=True)
class TopK(Order):
    """The exact `count` largest elements of each row, ties broken by position: a `Selection`.

    `ranks` may ask for 0 (nothing kept). Several columns select nested sets.
    """

    def finish(self, state: _Digits) -> "Selection | TopK | Ties":
        """Return the selection, or the next fold towards it."""
        asked = replace(self, ranks=lambda n, t: np.maximum(self.ranks(n, t), 1))
        if state.size == 0:
            t = 1
            none = np.zeros((t, 1), np.int64)
            return Selection(Ranked(none.astype(np.float32), none, none, none, 0), None)
        found = Order.finish(asked, state)
        if isinstance(found, Order):
            return replace(self, found=found.found)
        found = found._replace(ranks=self.ranks(found.size, found.values.shape[0]))
        if bool(np.all((found.above + found.equal == found.ranks) | (found.ranks == 0))):
            return Selection(found._replace(ties=None), None)
        if found.ties is not None:
            return Selection.of(found, found.ties)
        return Ties(of=self.of, scope=self.scope, ranked=found)


def share_of(
    shares: PerExpert, *more: PerExpert, at_least: int = 1, official: bool = False
) -> Ranks:
    """Return ranks that keep int(share · n) elements, at least `at_least`, one column a share.

    `official` keeps int(share · n) + 1, as TIES' published code does.
    """

    def ranks(size: int, rows: int) -> np.ndarray:
        columns = []
        for share in (shares, *more):
            kept = [int(s * size) + (1 if official else 0) for s in per_expert(share, rows)]
            columns.append([min(max(k, at_least), size) for k in kept])
        return np.array(columns, np.int64).T

    return ranks

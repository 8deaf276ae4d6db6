"""Exact order statistics as folds: the values at given ranks, and the largest so many elements.

Radix selection over the bits of floats takes two passes over the data. One is enough where a sample
tells beforehand about where a rank will lie: all values near it are kept aside in the first pass
and the others are only counted, so that the exact value is found without reading again. A guess
that was wrong costs a pass and changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from pluribus.core.arrays import Array, like, per_expert
from pluribus.core.fold import Feeder, Parts, Values, magnitudes, rows_of
from pluribus.core.merger import At, PerExpert, Scope

SMALL = 1 << 17  # up to so many elements are kept and selected from directly
HELD = 1 << 24  # values set aside at most, so that memory does not grow with a tensor
SIGMAS = 4  # how far from a sample's quantile the exact one is still found in one pass

Ranks = Callable[[int, int], np.ndarray]  # (elements, rows) -> (t, k) ranks, 1 the largest


class Ranked(NamedTuple):
    """Exact order statistics of each row."""

    values: np.ndarray  # (t, k): the values at the ranks asked for
    ranks: np.ndarray  # (t, k): those ranks, 1-based from the largest
    above: np.ndarray  # (t, k): how many elements are strictly larger
    equal: np.ndarray  # (t, k): how many are equal
    size: int  # elements in a row
    ties: dict[tuple[int, int], np.ndarray] | None = None  # (t, k) equal ones by block, if known


class Aim(NamedTuple):
    """Where a sample expects the value of each rank, as bit patterns that sort like the floats."""

    low: np.ndarray  # (t, k) uint32
    high: np.ndarray  # (t, k) uint32


class _Near(NamedTuple):
    """What one block holds in the windows."""

    values: np.ndarray  # (t, k, most) uint32
    counts: np.ndarray  # (t, k): how many of them count


@dataclass
class _Seen:
    """State of an aimed pass: what lies in the windows, by block, and how much lies above them."""

    aim: Aim
    above: np.ndarray  # (t, k)
    values: dict[tuple[int, int], _Near] = field(default_factory=dict)
    held: int = 0  # numbers in `values`
    room: np.ndarray | None = None  # where a kernel puts those of one block


@dataclass
class _State:
    """State of one pass: few values whole, many as counts of 16-bit digits, or aimed."""

    size: int = 0
    width: int = 32
    zeros: Any = 0  # (t,) values that are zero, where they are left out
    kept: dict[tuple[int, int], np.ndarray] | None = field(default_factory=dict)  # while few
    counts: np.ndarray | None = None  # (t, k, 65536)
    seen: _Seen | None = None
    lost: bool = False  # too many values crowd in the windows


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
    nonzero: bool = False  # ranks are told how many of a row are not zero, one row at a time
    found: "tuple[np.ndarray, np.ndarray, int] | None" = None  # prefixes, above, digits known
    missed: bool = False  # an aimed pass missed: no further one is tried

    @property
    def aims(self) -> bool:
        """Whether a sample of the values can save a pass."""
        return self.scope == "tensor" and self.found is None and not self.missed

    def init(self, aim: Aim | None = None) -> _State:
        """See `Fold`; with an `aim` one pass may be enough."""
        if aim is None:
            return _State() if self.found is None else _State(kept=None)
        return _State(kept=None, seen=_Seen(aim, np.zeros(aim.low.shape, np.int64)))

    def update(self, state: _State, values: Array, at: At) -> _State:
        """See `Fold`."""
        from pluribus.kernels.fold import between

        rows = rows_of(values)
        state.width = rows[0].dtype.itemsize * 8
        state.size += rows[0].size
        if self.nonzero:
            state.zeros = state.zeros + np.array([np.count_nonzero(row == 0) for row in rows])
        if state.seen is not None:
            bits, windows = np.stack(rows).view(np.uint32), state.seen.aim
            return self._near(
                state, at, bits.shape, lambda *into: between(bits, self.signed, *windows, *into)
            )
        if state.kept is not None and state.size <= SMALL:
            state.kept[at.order] = np.stack(rows)
            return state
        if state.kept is not None:
            self._spill(state, len(rows))
        elif state.counts is None:
            state.counts = self._zeros(len(rows))
        self._count(state, rows)
        return state

    def feeder(self) -> Feeder | None:
        """Return what takes the magnitudes of whole blocks."""
        plain = self.of is magnitudes and not self.signed and not self.nonzero
        return self._magnitudes if plain else None

    def _magnitudes(
        self,
        state: _State,
        base: np.ndarray | None,
        experts: np.ndarray,
        at: At,
        folded: Mapping[str, Any],
    ) -> _State:
        from pluribus.kernels.fold import magnitudes_between, magnitudes_of

        assert base is not None
        line, flat = base.reshape(-1), experts.reshape(experts.shape[0], -1)
        if state.seen is None:
            values = np.empty(flat.shape, np.float32)
            magnitudes_of(line, flat, values)
            return self.update(state, values, at)
        state.size += flat.shape[1]
        windows = state.seen.aim
        return self._near(
            state, at, flat.shape, lambda *into: magnitudes_between(line, flat, *windows, *into)
        )

    def join(self, one: _State, other: _State) -> _State:
        """See `Fold`."""
        for state in (one, other):
            if state.seen is not None:
                state.seen.room = None
        if one.size == 0:
            return other
        if other.size == 0:
            return one
        one.size += other.size
        one.zeros = one.zeros + other.zeros
        if one.seen is not None and other.seen is not None:
            one.seen.above += other.seen.above
            one.seen.values |= other.seen.values
            one.seen.held += other.seen.held
            one.lost |= other.lost or one.seen.held > HELD
            if one.lost:
                one.seen.values = {}
            return one
        if one.kept is not None and other.kept is not None and one.size <= SMALL:
            one.kept |= other.kept
            return one
        for state in (one, other):
            if state.kept is not None:
                self._spill(state, next(iter(state.kept.values())).shape[0])
        assert one.counts is not None
        assert other.counts is not None
        one.counts += other.counts
        return one

    def finish(self, state: _State) -> "Ranked | Order":
        """Return the order statistics, or the fold that counts the next digit."""
        if state.size == 0:
            none = np.zeros((1, 1), np.int64)
            return Ranked(none.astype(np.float32), none, none, none, 0)
        if state.kept is not None:
            return self._direct(state)
        if state.seen is not None:
            return self._from_windows(state, state.seen) or replace(self, missed=True)
        counts = state.counts
        assert counts is not None
        t = counts.shape[0]
        ranks = self._asked(state, t)
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
        return replace(self, found=(prefixes, above, known))

    def _asked(self, state: _State, rows: int) -> np.ndarray:
        """Return the ranks of what was seen, (t, k)."""
        if not self.nonzero:
            return self.ranks(state.size, rows)
        zeros = np.broadcast_to(state.zeros, (rows,))
        return np.concatenate([self.ranks(state.size - int(zero), 1) for zero in zeros])

    # -- few values ------------------------------------------------------------------------------

    def _direct(self, state: _State) -> Ranked:
        blocks = state.kept or {(0, 0): np.zeros((0, 0), np.float32)}
        rows = np.concatenate([blocks[order] for order in sorted(blocks)], axis=1)
        ranks = self._asked(state, rows.shape[0])
        values = np.empty(ranks.shape, rows.dtype)
        for i, row in enumerate(rows):
            wanted = row.size - ranks[i]
            values[i] = np.partition(row, wanted)[wanted] if row.size else 0
        above = (rows[:, None, :] > values[:, :, None]).sum(2)
        equal = (rows[:, None, :] == values[:, :, None]).sum(2)
        ties = {order: (blocks[order][:, None, :] == values[:, :, None]).sum(2) for order in blocks}
        return Ranked(values, ranks, above, equal, state.size, ties)

    # -- aimed -----------------------------------------------------------------------------------

    def aim(self, sample: np.ndarray, size: int) -> Aim | None:
        """Return windows in which the ranks of a tensor of `size` elements will lie, most likely.

        `sample` (pieces, t, n) are values from places all over it; how the pieces differ among
        themselves tells how wide to aim. None where float64 values are to be ranked.
        """
        pieces, t, n = sample.shape
        if sample.dtype != np.float32 or n == 0:
            return None
        whole = np.sort(self._key(np.ascontiguousarray(sample.swapaxes(0, 1)).reshape(t, -1)))
        m = pieces * n
        guess = _State(size=size)
        if self.nonzero:
            guess.zeros = ((sample == 0).mean((0, 2)) * size).astype(np.int64)
        ranks = self._asked(guess, t)
        low, high = np.empty(ranks.shape, np.uint32), np.empty(ranks.shape, np.uint32)
        keys = self._key(sample)
        for i, j in np.ndindex(*ranks.shape):
            share = min(max(ranks[i, j] / size, 0.0), 1.0)
            at = whole[i, min(int((1 - share) * m), m - 1)]
            spread = np.sqrt(share * (1 - share) / m)
            if pieces > 1:
                spread = max(spread, (keys[:, i] >= at).mean(1).std() / np.sqrt(pieces))
            slack = SIGMAS * spread + 3 / m
            down, up = int((1 - share - slack) * m), int((1 - share + slack) * m) + 1
            low[i, j] = whole[i, down] if down > 0 else 0
            high[i, j] = whole[i, up] if up < m else np.iinfo(np.uint32).max
        return Aim(low, high)

    def _near(
        self, state: _State, at: At, shape: tuple[int, ...], scan: Callable[..., None]
    ) -> _State:
        """Take one block into an aimed pass; `scan(above, counts, out)` looks at its values."""
        seen = state.seen
        assert seen is not None
        if state.lost:
            return state
        t, n = shape
        k = seen.aim.low.shape[1]
        if seen.room is None or seen.room.shape[2] < n:
            seen.room = np.empty((t, k, n), np.uint32)
        counts, out = np.zeros((t, k), np.int64), seen.room
        scan(seen.above, counts, out)
        seen.values[at.order] = _Near(out[:, :, : counts.max()].copy(), counts)
        seen.held += int(counts.sum())
        if seen.held > max(state.size * t * k // 4, SMALL):
            state.lost = True  # the values crowd together: counting digits is cheaper
            seen.values = {}
        return state

    def _from_windows(self, state: _State, seen: _Seen) -> Ranked | None:
        """Return the order statistics, or None if one lies outside its window."""
        if state.lost:
            return None
        ranks = self._asked(state, seen.above.shape[0])
        keys = np.zeros(ranks.shape, np.uint32)
        above, equal = seen.above.copy(), np.zeros(ranks.shape, np.int64)
        ties = {order: np.zeros(ranks.shape, np.int64) for order in seen.values}
        for i, j in np.ndindex(*ranks.shape):
            cells = {
                order: near.values[i, j, : near.counts[i, j]] for order, near in seen.values.items()
            }
            held = np.concatenate(list(cells.values()))
            rest = int(ranks[i, j] - above[i, j])
            if not 1 <= rest <= held.size:
                return None
            key = np.partition(held, held.size - rest)[held.size - rest]
            keys[i, j] = key
            above[i, j] += np.count_nonzero(held > key)
            equal[i, j] = np.count_nonzero(held == key)
            for order, cell in cells.items():
                ties[order][i, j] = np.count_nonzero(cell == key)
        return Ranked(self._unkey(keys, 32), ranks, above, equal, state.size, ties)

    # -- digits ----------------------------------------------------------------------------------

    def _zeros(self, rows: int) -> np.ndarray:
        k = 1 if self.found is None else self.found[0].shape[1]
        return np.zeros((rows, k, 65536), np.int64)

    def _spill(self, state: _State, rows: int) -> None:
        """Turn kept blocks into counts."""
        state.counts = self._zeros(rows)
        kept, state.kept = state.kept, None
        for block in (kept or {}).values():
            self._count(state, list(block))

    def _count(self, state: _State, rows: list[np.ndarray]) -> None:
        from pluribus.kernels.fold import digits32, digits64

        width = rows[0].dtype.itemsize * 8
        word = np.uint32 if width == 32 else np.uint64
        count = digits32 if width == 32 else digits64
        assert state.counts is not None
        known = 0 if self.found is None else self.found[2]
        shift = word(width - 16 * (known + 1))
        above = word(min(width - 16 * known, width - 1))
        for i, row in enumerate(rows):
            bits = row.view(word)
            done: dict[int, int] = {}
            for j in range(state.counts.shape[1]):
                prefix = 0 if self.found is None else int(self.found[0][i, j])
                if prefix in done:  # several ranks fall into one bin: it is counted once,
                    continue  # and shared above
                done[prefix] = j
                count(bits, self.signed, known > 0, word(prefix), above, shift, state.counts[i, j])

    def _key(self, values: np.ndarray) -> np.ndarray:
        bits = values.view(np.uint32)
        if not self.signed:
            return bits
        top = np.uint32(1 << 31)
        return np.where(bits == top, top, np.where(bits & top, ~bits, bits | top))

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

    def init(self) -> Parts:
        """See `Fold`."""
        return Parts()

    def update(self, state: Parts, values: Array, at: At) -> Parts:
        """See `Fold`."""
        cuts = self.ranked.values
        rows = rows_of(values)
        state[at.order] = np.array(
            [[np.count_nonzero(row == cut) for cut in cuts[i]] for i, row in enumerate(rows)]
        )
        return state

    def join(self, one: Parts, other: Parts) -> Parts:
        """See `Fold`."""
        one.update(other)
        return one

    def finish(self, state: Parts) -> "Selection":
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

    def finish(self, state: _State) -> "Selection | TopK | Ties":
        """Return the selection, or the next fold towards it."""
        asked = replace(self, ranks=lambda n, t: np.maximum(self.ranks(n, t), 1))
        if state.size == 0:
            t = 1
            none = np.zeros((t, 1), np.int64)
            return Selection(Ranked(none.astype(np.float32), none, none, none, 0), None)
        found = Order.finish(asked, state)
        if isinstance(found, Order):
            return replace(self, found=found.found, missed=found.missed)
        found = found._replace(ranks=self._asked(state, found.values.shape[0]))
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

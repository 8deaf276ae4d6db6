"""Stream a pool through the engine's folds and tally every tensor: two passes, bounded memory.

The first pass takes norms, inner products, signs and TALL masks, and finds each expert's exact
cut; the second looks at the coordinates beyond the cuts.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from pluribus.core.errors import InputError
from pluribus.core.fold import magnitudes
from pluribus.core.merger import At, Fraction, NonNegative, Stage, merger
from pluribus.core.order import Selection, TopK, share_of
from pluribus.engine.driver import plan_pool
from pluribus.engine.plan import Plan
from pluribus.engine.run import Progress, Run
from pluribus.inspect.tally import Tally


@dataclass(frozen=True, kw_only=True)
class _Added:
    """A fold that adds up arrays by name, in the order of blocks."""

    of: Callable[..., Any]
    scope: str = "tensor"

    def init(self) -> dict[tuple[int, int], Any]:
        """See `Fold`."""
        return {}

    def update(self, state: dict, values: Any, at: At) -> dict:
        """See `Fold`."""
        state[at.order] = values
        return state

    def join(self, one: dict, other: dict) -> dict:
        """See `Fold`."""
        one.update(other)
        return one

    def finish(self, state: dict) -> tuple[np.ndarray, ...]:
        """Return the sums."""
        blocks = [state[order] for order in sorted(state)]
        return tuple(reduce(np.add, parts) for parts in zip(*blocks, strict=True))


@merger("inspect", paper="arXiv:2405.07813")
@dataclass(frozen=True, kw_only=True)
class Survey:
    """What to ask of a pool, in the form of a merger whose folds are all there is."""

    density: Fraction = 0.2
    mask_lambda: NonNegative = 0.4

    def folds(self) -> Sequence[Stage]:
        """Ask for all that one pass can give, then for the supports."""
        trim = TopK(of=magnitudes, ranks=share_of(self.density))
        return [
            {"whole": _Added(of=self._whole), "trim": trim},
            {"support": _Added(of=self._support)},
        ]

    def _whole(self, base: np.ndarray, experts: np.ndarray, *, at: At) -> tuple[np.ndarray, ...]:
        from pluribus.kernels.inspect import survey

        return survey(self, base, experts, at=at)

    def _support(
        self, base: np.ndarray, experts: np.ndarray, *, at: At, trim: Selection
    ) -> tuple[np.ndarray, ...]:
        from pluribus.kernels.inspect import supports

        return supports(self, base, experts, at=at, trim=trim)


class _Nowhere:
    """A sink for a run that merges nothing."""

    def write(self, job: Any, block: int, raw: np.ndarray) -> None:
        """See `Sink`."""

    def done(self, job: Any, span: int, digests: Mapping[str, list[str]]) -> None:
        """See `Sink`."""

    def finished(self, job: Any, span: int) -> bool:
        """See `Sink`."""
        return False


def measure(
    pool: Any,
    survey: Survey,
    *,
    threads: int | None,
    memory: int,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[Plan, dict[str, Tally], int]:
    """Return the plan, a tally for each floating tensor, and how many bytes were read.

    Raises InputError if there is no base or nothing to compare, NonFiniteError for NaN.
    """
    if memory < 1 << 20:
        raise InputError(f"memory budget {memory} bytes: give at least 1MB")
    plan = plan_pool(pool, survey)
    run = Run(
        plan,
        _Nowhere(),
        threads=threads or os.cpu_count() or 1,
        memory=memory,
        merging=False,
    )
    run.run(on_progress)
    t = len(pool.experts)
    tallies = {
        job.name: _tally(job.experts[0].spec.size, t, folded)
        for job, folded in zip(plan.jobs, run.folded, strict=True)
        if job.merger is not None
    }
    return plan, tallies, run.progress.done


def _tally(size: int, t: int, folded: Mapping[str, Any]) -> Tally:
    if size == 0:
        return Tally.none(t)
    sums, counts, both, opposed = folded["whole"]
    kept_sums, kept_counts, kept_both, kept_opposed = folded["support"]
    changed, some = counts[:t], counts[t : t + 3]
    return Tally(
        size=size,
        base_square=float(sums[0]),
        gram=sums[1 + t :].reshape(t, t),
        absolute=sums[1 : 1 + t],
        changed=changed,
        both=_whole(both, changed),
        opposed=_whole(opposed),
        changed_by=some[:2],
        clashing=int(some[2]),
        masks=counts[t + 3 : 2 * t + 3],
        masked_by=counts[2 * t + 3 :],
        kept=kept_counts[:t],
        kept_square=kept_sums,
        kept_both=_whole(kept_both, kept_counts[:t]),
        kept_opposed=_whole(kept_opposed),
        kept_by=kept_counts[t : t + 2],
        kept_clashing=int(kept_counts[t + 2]),
    )


def _whole(lower: np.ndarray, diagonal: np.ndarray | int = 0) -> np.ndarray:
    """Mirror a matrix that is filled below its diagonal, and set the diagonal."""
    return lower + lower.T + np.diag(np.broadcast_to(diagonal, lower.shape[0]))

"""What a knowledge base guarantees and what it cost, as plain values and as text.

Guaranteed by construction: at most m trainings a task and none a preference; stored points never
change; a posterior that was dropped lies within d_thr of the point that stands for it. Every
coordinate's interval holds `mass` of the combined Gaussian; the box of all n coordinates holds
mass^n, which is why the box of 0.01 is a small neighbourhood of the mean and no confidence region.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, NamedTuple

from pluribus.core.errors import InputError

if TYPE_CHECKING:
    from pluribus.train.continual.ibcl import CredalBase


class Cost(NamedTuple):
    """What has been trained, and what is kept."""

    trained_models: int
    steps: int  # of the optimiser, over all trainings
    stored_points: int
    stored_numbers: int  # means and standard deviations


@dataclass(frozen=True)
class Report:
    """State and guarantees of a knowledge base; distances are in the units of `distance`."""

    tasks: tuple[str, ...]
    stored_points: int
    reused_points: int
    most_points: int  # m for every task
    trained_models: int
    steps: int
    kl_weight: float | str
    kl_over_elbo: dict[str, float]  # by task: how often the KL counts for once in the bound
    coordinates: int
    mass: float  # of one coordinate's interval
    log10_box_mass: float  # of all intervals at once
    distance: str
    d_thr: float
    within: dict[str, float | None]  # by task: mean distance between its own points
    between: float | None  # mean distance between points of different tasks
    largest_substitution: float | None  # distance of a dropped posterior to its substitute
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        m = self.most_points // max(len(self.tasks), 1)
        over = sorted(self.kl_over_elbo.values())
        spread = f"{over[0]:.3g}" if over[0] == over[-1] else f"{over[0]:.3g} to {over[-1]:.3g}"
        inner = [value for value in self.within.values() if value is not None]
        lines = [
            f"tasks           {len(self.tasks)}: {', '.join(self.tasks)}",
            f"points          {self.stored_points} stored, {self.reused_points} reused, at most "
            f"{self.most_points} ({m} a task)",
            f"trained         {self.trained_models} models in {self.steps} steps; none for a "
            "preference",
            f"kl_weight       {self.kl_weight}: the prior counts {spread} times what the evidence "
            "bound gives it",
            f"region          {self.mass:.3g} of each coordinate's probability; of all "
            f"{self.coordinates} at once 10^{self.log10_box_mass:.0f}",
            "stored points   never change: a preference over learned tasks keeps its model",
        ]
        if self.largest_substitution is not None:
            lines.append(
                f"reuse           a substitute is at most {self.largest_substitution:.3g} from the "
                f"posterior that it stands for (threshold {self.d_thr:g}, {self.distance})"
            )
        if inner and self.between is not None:
            lines.append(
                f"distances       {statistics.fmean(inner):.3g} within a task, {self.between:.3g} "
                f"between tasks ({self.distance}, means)"
            )
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def cost(base: "CredalBase") -> Cost:
    """Return what a knowledge base has cost so far."""
    return Cost(
        sum(len(learned.points) for learned in base.learned),
        sum(learned.steps for learned in base.learned),
        len(base.points),
        sum(2 * point.size for point in base.points),
    )


def report(base: "CredalBase", mass: float) -> Report:
    """Return the report of a knowledge base. Raises InputError before the first task."""
    if not base.learned:
        raise InputError("no task has been learned yet, so there is nothing to report")
    if not 0 < mass < 1:
        raise InputError(f"mass = {mass!r}: give a probability above 0 and below 1")
    own = {learned.task: tuple(dict.fromkeys(learned.points)) for learned in base.learned}
    gap: dict[tuple[int, int], float] = {}
    for one, other in combinations(range(len(base.points)), 2):
        found = base.points[one].distance(base.points[other], base.distance)
        gap[one, other] = gap[other, one] = found
    within = {task: _mean(gap[pair] for pair in combinations(of, 2)) for task, of in own.items()}
    between = {
        task: _mean(
            gap[pair]
            for other, theirs in own.items()
            if other != task
            for pair in product(set(of) - set(theirs), set(theirs) - set(of))
        )
        for task, of in own.items()
    }
    across = [value for value in between.values() if value is not None]
    reused = [
        distance
        for learned in base.learned
        for distance, stored in zip(learned.nearest, learned.stored, strict=True)
        if not stored and distance is not None
    ]
    spent = cost(base)
    over = {learned.task: base.inference.over_elbo(learned.examples) for learned in base.learned}
    return Report(
        tasks=base.tasks,
        stored_points=len(base.points),
        reused_points=len(reused),
        most_points=len(base.prior_stds) * len(base.tasks),
        trained_models=spent.trained_models,
        steps=spent.steps,
        kl_weight=base.inference.kl_weight,
        kl_over_elbo=over,
        coordinates=base.network.size,
        mass=mass,
        log10_box_mass=base.network.size * math.log10(mass),
        distance=base.distance,
        d_thr=base.d_thr,
        within=within,
        between=_mean(across),
        largest_substitution=max(reused, default=None),
        warnings=tuple(_warnings(within, between, over)),
    )


def _mean(values: Any) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _warnings(
    within: dict[str, float | None], between: dict[str, float | None], over: dict[str, float]
) -> list[str]:
    notes = []
    for task, inner in within.items():
        outer = between[task]
        if inner is not None and outer is not None and inner > outer:
            notes.append(
                f"{task}: its own points lie {inner:.3g} apart, further than from other tasks' "
                f"points ({outer:.3g}); their average may lie between modes: use warm_start, fewer "
                'or closer prior_stds, or combine="mixture"'
            )
    heavy = [task for task, times in over.items() if times > 10]
    if heavy:
        notes.append(
            f"the prior counts {max(over.values()):.3g} times the evidence bound's weight, which "
            'holds large tasks back; kl_weight="elbo" counts it once'
        )
    return notes

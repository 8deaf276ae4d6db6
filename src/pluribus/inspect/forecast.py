"""What a merge of this pool is likely to lose, from pools whose merges were measured.

The package's own forecast, `calibrated`, is each method's mean over the measured beds, and the
advice the method that loses least on average. `fit` can do more: features x of a pool
(`pluribus.inspect.features`, standardised over the measured pools) predict the loss of every
candidate method by ridge regression,

    loss_m(x) = mean_m + W_m x,     W = argmin |L - X W|^2 + penalty |W|^2,   X (p, f), L (p, m)

with every bed (a zoo at some settings, all seeds) weighing the same. An infinite penalty
always chooses the method that is best on average. A finite one, with one of the `SETS` of features,
takes its place only if its choices lose less on zoos left out in turn, by more than one standard
error of that gain over zoos (Breiman et al.'s rule, against luck with few zoos); of several the one
that gains most, of equal ones that whose forecasts err least. The spread of a forecast is the root
mean square error of its method on zoos left out.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from pluribus.core.errors import InputError
from pluribus.inspect.beds import BEDS
from pluribus.inspect.calibrate import Measured

USED = ("experts", "cosine", "ratio", "even", "crowded", "opposed")
SETS = (("experts",), ("experts", "cosine", "opposed"), USED)
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
NEAR = 3  # measured pools that are shown
FAR = 3.0  # distance to the nearest measured pool from which on nothing is known
FILE = "calibration.json"


@dataclass(frozen=True)
class Forecast:
    """What one method is expected to lose: 0.1 is a tenth of the specialists' score."""

    method: str
    loss: float
    spread: float  # root mean square error on zoos that took no part in the fit


@dataclass(frozen=True)
class Near:
    """A measured pool that is like this one, and what did best there."""

    label: str
    distance: (
        float  # of the feature that differs most, in standard deviations of the measured pools
    )
    best: str
    loss: float


@dataclass(frozen=True, eq=False)
class Model:
    """A fit: how features tell losses."""

    methods: tuple[str, ...]
    pools: tuple[Measured, ...]
    centre: np.ndarray  # (f,)
    scale: np.ndarray  # (f,)
    means: np.ndarray  # (m,)
    slopes: np.ndarray  # (f, m)
    spread: np.ndarray  # (m,)
    penalty: float
    used: tuple[str, ...]  # features that tell losses; slopes of the others are 0

    def predict(self, features: dict[str, float]) -> list[Forecast]:
        """Return all methods, the one that is expected to lose least first."""
        x = self._standard(features)
        losses = self.means + (x @ self.slopes if math.isfinite(self.penalty) else 0)
        found = [
            Forecast(method, float(loss), float(spread))
            for method, loss, spread in zip(self.methods, losses, self.spread, strict=True)
        ]
        return sorted(found, key=lambda one: one.loss)

    def near(self, features: dict[str, float], count: int = NEAR) -> list[Near]:
        """Return the measured pools that are most like this one."""
        x = self._standard(features)
        found = []
        for pool in self.pools:
            gap = float(abs(self._standard(pool.features) - x).max())
            best = min(pool.loss, key=lambda method: pool.loss[method])
            found.append(Near(pool.label, gap, best, pool.loss[best]))
        return sorted(found, key=lambda one: one.distance)[:count]

    def _standard(self, features: dict[str, float]) -> np.ndarray:
        return (_row(features) - self.centre) / self.scale


def _row(features: dict[str, float]) -> np.ndarray:
    return np.array([features[name] for name in USED])


def zoo_of(pool: Measured) -> str:
    """Return the zoo of a pool's bed, or the bed's own name: beds of one zoo share their tasks."""
    return BEDS[pool.bed].zoo if pool.bed in BEDS else pool.bed


def fit(
    pools: Sequence[Measured],
    group: Callable[[Measured], str] = zoo_of,
    *,
    by_features: bool = True,
) -> Model:
    """Fit the pools of two groups or more, choosing the penalty on groups left out in turn.

    Without `by_features` the penalty is infinite.

    Raises InputError for fewer groups: there is nothing to choose on.
    """
    groups = sorted({group(pool) for pool in pools})
    if len(groups) < 2:
        raise InputError(f"pools of {len(groups)} zoo(s) were given; a fit needs two to choose on")
    outcomes = {
        (penalty, used): _left_out(pools, groups, group, penalty, used)
        for penalty, used in itertools.product(PENALTIES, SETS)
        if (by_features if math.isfinite(penalty) else used == USED)
    }
    plain = (math.inf, USED)
    gains = {}
    for one, (lost, _) in outcomes.items():
        gain = outcomes[plain][0] - lost
        error = float(gain.std(ddof=1)) / len(groups) ** 0.5
        if gain.mean() > error + 1e-9:
            gains[one] = round(float(gain.mean()), 6)
    good = [one for one in gains if gains[one] == max(gains.values())] or [plain]
    penalty, used = min(good, key=lambda one: (float(outcomes[one][1].mean()), len(one[1])))
    return _solved(pools, penalty, used, outcomes[penalty, used][1])


def _left_out(
    pools: Sequence[Measured],
    groups: Sequence[str],
    group: Callable[[Measured], str],
    penalty: float,
    used: tuple[str, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Return what choices lose on each group left out, (g,), and forecasts' errors, (m,)."""
    lost, errors = [], []
    for held in groups:
        model = _solved([pool for pool in pools if group(pool) != held], penalty, used)
        own = [pool for pool in pools if group(pool) == held]
        rows = []
        for pool in own:
            told = model.predict(pool.features)
            by = {one.method: one.loss for one in told}
            rows.append([by[method] - pool.loss[method] for method in model.methods])
            lost.append(pool.loss[told[0].method] / len(own))
        errors.append((np.array(rows) ** 2).mean(0))
        lost[-len(own) :] = [sum(lost[-len(own) :])]
    return np.array(lost), np.sqrt(np.mean(errors, axis=0))


def _solved(
    pools: Sequence[Measured],
    penalty: float,
    used: tuple[str, ...] = USED,
    spread: np.ndarray | None = None,
) -> Model:
    methods = tuple(pools[0].loss)
    beds = [pool.bed for pool in pools]
    weights = np.array([1 / beds.count(bed) for bed in beds])
    weights /= weights.sum()
    x = np.stack([_row(pool.features) for pool in pools])
    losses = np.array([[pool.loss[method] for method in methods] for pool in pools])
    centre = weights @ x
    scale = np.sqrt(weights @ (x - centre) ** 2)
    scale = np.where(scale > 1e-9, scale, 1.0)
    means = weights @ losses
    x = (x - centre) / scale
    slopes = np.zeros((x.shape[1], len(methods)))
    if math.isfinite(penalty):
        at = [USED.index(name) for name in used]
        told = x[:, at]
        squares = (told * weights[:, None]).T @ told + penalty * np.eye(len(at))
        slopes[at] = np.linalg.solve(squares, (told * weights[:, None]).T @ (losses - means))
    missed = np.sqrt(weights @ (losses - means - x @ slopes) ** 2)
    error = missed if spread is None else spread
    return Model(methods, tuple(pools), centre, scale, means, slopes, error, penalty, used)


@functools.cache
def calibrated() -> tuple[Model, dict[str, Any]] | None:
    """Return the means of the package's own measurements, and where they come from.

    Choosing by features is not reliably better on zoos left out: see the claim `recommendation`.
    """
    file = resources.files("pluribus.inspect") / FILE
    if not file.is_file():
        return None
    told = json.loads(file.read_text("utf-8"))
    pools = read(told)
    return fit(pools, by_features=False), {
        key: told[key] for key in ("made_by", "versions", "density")
    }


def read(told: dict[str, Any]) -> list[Measured]:
    """Return the pools of a calibration file."""
    return [
        Measured(
            one["bed"],
            one["seed"],
            tuple(one["tasks"]),
            one["features"],
            dict(zip(told["candidates"], one["loss"], strict=True)),
            one["base"],
            one["rules"],
        )
        for one in told["pools"]
    ]

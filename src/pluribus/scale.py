"""Find a merge's coefficients by a score, merging once where the method allows it.

Nearly every method ends in theta_0 + scale * update. Then the update is merged once and each
candidate costs one multiplication and one score:

    theta(s) = theta_0 + s U,            U = merge(scale=1) - theta_0
    theta(w) = theta_0 + s sum_t w_t U_t,  U_t = merge(weight=unit t, scale=1) - theta_0

Whether a method is of this form is not taken on trust: the first candidate is merged in full as
well, and if it differs, so is every other one. Memory: the base and the update (one per expert, if
weights are searched) in float32.
"""

import itertools
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pluribus.core.arrays import per_expert
from pluribus.core.errors import InputError, nearest
from pluribus.core.merger import facts
from pluribus.core.optional import optional
from pluribus.core.pool import Pool

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[[dict[str, "Tensor"]], float]
Span = tuple[float, float] | Sequence[float]  # (low, high), or a list of values to try
Point = dict[str, float]
SINGLE = re.compile(r"(\w+)\[(\d+|\*)\]")


class Trial(NamedTuple):
    """One candidate and what it scored."""

    parameters: Point
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The best candidate, everything that was tried, and how many merges it took."""

    parameters: Point
    score: float
    method: Any  # the merger with the best parameters
    trials: tuple[Trial, ...]
    merges: int  # full merges that were run; the other candidates were scaled in memory
    at_edge: tuple[str, ...]  # parameters whose best value is the least or greatest tried

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and text, for JSON."""
        return {
            "parameters": dict(self.parameters),
            "score": self.score,
            "merge_method": facts(self.method).name,
            "trials": [{"parameters": dict(t.parameters), "score": t.score} for t in self.trials],
            "merges": self.merges,
            "at_edge": list(self.at_edge),
        }


def search_scale(
    score: Score,
    spans: Mapping[str, Span],
    method: Any,
    pool: Pool,
    *,
    optimizer: Literal["grid", "cma"] = "grid",
    budget: int | None = None,
    points: int = 11,
    seed: int = 0,
    **merging: Any,
) -> SearchResult:
    """Maximise `score(state_dict)` over a method's parameters.

    `spans` maps fields of the method ("scale", "density"), one expert's value ("weight[0]") or
    every expert's ("weight[*]") to a list of values or a pair (low, high); a grid takes `points`
    even steps of a pair. A grid larger than `budget` is sampled without replacement. "cma" runs
    CMA-ES between the least and greatest values for `budget` (default 100) candidates. `merging`
    goes to `merge`. NaN scores count as worst.

    Raises InputError for a parameter the method lacks or a span without values, ExtraError if "cma"
    is asked for without its package. Warns if the best value lies on the edge of its span.
    """
    from pluribus.core.method import method_of

    method = method_of(method)
    spans = _expanded(spans, method, len(pool.experts))
    if budget is not None and budget < 1:
        raise InputError(f"budget = {budget}: give at least 1")
    models = _Models(method, pool, {"seed": seed, **merging})
    trials: list[Trial] = []

    def tried(point: Point, of: int) -> float:
        value = float(score(models.at(point, of)))
        trials.append(Trial(dict(point), value))
        return value

    if optimizer == "grid":
        candidates = _grid(spans, points, budget, seed, models.outer)
        sizes = [models.outer(point) for point in candidates]
        for point, group in zip(candidates, sizes, strict=True):
            tried(point, sizes.count(group))
    elif optimizer == "cma":
        _evolve(tried, spans, budget or 100, seed, models)
    else:
        raise InputError(f"optimizer = {optimizer!r}: there are grid and cma")
    usable = [trial for trial in trials if not math.isnan(trial.score)]
    if not usable:
        raise InputError(f"the score was NaN for all {len(trials)} candidates")
    best = max(usable, key=lambda trial: trial.score)
    edge = tuple(name for name, span in spans.items() if _at_edge(best.parameters[name], span))
    if edge:
        shown = ", ".join(f"{name} = {best.parameters[name]:g}" for name in edge)
        warnings.warn(
            f"search_scale: the best {shown} lies on the edge of what was tried; widen the span",
            stacklevel=2,
        )
    return SearchResult(
        best.parameters,
        best.score,
        configured(method, best.parameters, len(pool.experts)),
        tuple(trials),
        models.merges,
        edge,
    )


def configured(method: Any, point: Mapping[str, float], experts: int) -> Any:
    """Return `method` with the parameters of a point; "weight[0]" sets one expert's value."""
    changes: dict[str, Any] = {}
    for name, value in point.items():
        single = SINGLE.fullmatch(name)
        if single is None:
            changes[name] = value
            continue
        field = single[1]
        old = changes.get(field, getattr(method, field))
        row = list(old) if isinstance(old, tuple) else [old] * experts
        row[int(single[2])] = value
        changes[field] = tuple(row)
    for name, value in changes.items():  # a grid of whole numbers for a whole-number field
        if isinstance(getattr(method, name), int) and not isinstance(value, tuple):
            changes[name] = int(value) if float(value).is_integer() else value
    return replace(method, **changes)


class _Models:
    """Merged state dicts by point, from an update kept in memory where that is exact."""

    def __init__(self, method: Any, pool: Pool, merging: Mapping[str, Any]) -> None:
        self.method, self.pool, self.merging = method, pool, dict(merging)
        self.count = len(pool.experts)
        self.merges = 0
        # Without a base there is nothing that a scale leaves in place.
        self.linear = facts(method).base == "required" and pool.base is not None
        self.checked = False
        self._base: dict[str, Tensor] = {}
        self._key: Any = None
        self._updates: dict[int | None, dict[str, Tensor]] = {}  # by expert, or None for all

    def inner(self, name: str) -> bool:
        """Return whether the merge may be linear in a parameter."""
        if not self.linear:
            return False
        normal = getattr(self.method, "normalize", False)
        by_weight = facts(self.method).name == "task_arithmetic" and not normal
        return name == "scale" or (by_weight and name.startswith("weight["))

    def outer(self, point: Point) -> tuple[tuple[str, float], ...]:
        """Return the part of a point that needs a merge of its own."""
        return tuple((name, value) for name, value in point.items() if not self.inner(name))

    def at(self, point: Point, of: int) -> dict[str, "Tensor"]:
        """Return the model at `point`, one of `of` points that share an update."""
        parts = [name for name in point if name.startswith("weight[") and self.inner(name)]
        cost = self.count if parts else 1
        if not any(map(self.inner, point)) or (of <= cost and self._key != self.outer(point)):
            return self._typed(self._merged(point))
        scaled = self._scaled(point, bool(parts))
        if not self.checked:
            self.checked = True
            true = self._merged(point)
            if not self._close(true, scaled):
                self.linear = False
                self._updates, self._base = {}, {}
                return self._typed(true)
        return self._typed(scaled)

    def _merged(self, point: Point) -> dict[str, "Tensor"]:
        from pluribus.engine.driver import merge

        self.merges += 1
        method = configured(self.method, point, self.count)
        keywords = {"out_dtype": "float32", **self.merging}
        merged = merge(self.pool, method, None, **keywords)
        return {name: merged[name] for name in merged}

    def _scaled(self, point: Point, by_weight: bool) -> dict[str, "Tensor"]:
        key = self.outer(point)
        if not self._base:
            base = self.pool.base
            assert base is not None
            self._base = {name: _wide(base[name]) for name in base}
        whole = configured(self.method, point, self.count)
        if self._key != key:
            self._key, self._updates = key, {}
            fixed = dict(key) | ({"scale": 1.0} if hasattr(whole, "scale") else {})
            for part in range(self.count) if by_weight else (None,):
                unit = {} if part is None else {f"weight[{i}]": 0.0 for i in range(self.count)}
                merged = self._merged(
                    fixed | unit | ({} if part is None else {f"weight[{part}]": 1.0})
                )
                self._updates[part] = {
                    name: value - self._base[name]
                    for name, value in merged.items()
                    if value.is_floating_point()
                }
        scale = float(getattr(whole, "scale", 1.0))
        weight = per_expert(getattr(whole, "weight", 1.0), self.count)
        out = {}
        for name, value in self._base.items():
            out[name] = value.clone()  # the score may do with it what it likes
            for part, update in self._updates.items():
                if name in update:
                    one = 1.0 if part is None else weight[part]
                    out[name] = out[name] + (scale * one) * update[name]
        return out

    def _close(self, one: Mapping[str, "Tensor"], other: Mapping[str, "Tensor"]) -> bool:
        """Return whether two merges agree within what the rounding of their updates explains."""
        for name, value in one.items():
            if not value.is_floating_point() or not value.numel():
                continue
            base = self._base[name]
            moved = float((value - base).abs().max())
            room = 1e-4 * moved + 1e-6 * float(base.abs().max())
            if float((value - other[name]).abs().max()) > room:
                return False
        return True

    def _typed(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Round to the element types of the pool's own tensors; tied names share one tensor."""
        reference = self.pool.base if self.pool.base is not None else self.pool.models[0]
        out: dict[str, Tensor] = {}
        for name in reference:
            if name in reference.aliases and reference.aliases[name] in out:
                out[name] = out[reference.aliases[name]]
                continue
            import torch

            kind = getattr(torch, reference.source(name).spec.kind.torch)
            out[name] = tensors[name].to(kind)
        return out


def _wide(tensor: "Tensor") -> "Tensor":
    return tensor.float() if tensor.is_floating_point() else tensor


def _expanded(spans: Mapping[str, Span], method: Any, experts: int) -> dict[str, Span]:
    """Check the spans against the method's fields, and spell out `weight[*]`."""
    if not spans:
        raise InputError("search_scale: name at least one parameter to search")
    known = [field.name for field in fields(method)]
    out: dict[str, Span] = {}
    for name, span in spans.items():
        single = SINGLE.fullmatch(name)
        field = single[1] if single else name
        if field not in known:
            raise InputError(
                f"{facts(method).name} has no parameter {field!r} to search; it has: "
                f"{', '.join(known)}." + nearest(field, known)
            )
        if single and single[2] != "*" and int(single[2]) >= experts:
            raise InputError(f"{name}: there are {experts} experts, counted from 0")
        if not len(span) or (isinstance(span, tuple) and (len(span) != 2 or span[0] >= span[1])):
            raise InputError(
                f"{name}: {span!r} is neither a list of values nor a pair (low, high), low < high"
            )
        if single and single[2] == "*":
            out |= {f"{field}[{i}]": span for i in range(experts)}
        else:
            out[name] = span
    return out


def _values(span: Span, points: int) -> list[float]:
    if not isinstance(span, tuple):
        return [float(value) for value in span]
    low, high = span
    if points < 2:
        raise InputError(f"points = {points}: a grid over a range needs at least 2")
    return [low + (high - low) * i / (points - 1) for i in range(points)]


def _grid(
    spans: Mapping[str, Span],
    points: int,
    budget: int | None,
    seed: int,
    outer: Callable[[Point], Any],
) -> list[Point]:
    """Return the grid's points, those that share a merge next to each other."""
    axes = [_values(span, points) for span in spans.values()]
    size = math.prod(len(axis) for axis in axes)
    chosen: Iterator[int] | list[int] = iter(range(size))
    if budget is not None and budget < size:
        chosen = sorted(random.Random(seed).sample(range(size), budget))
    elif size > 100_000:
        raise InputError(f"the grid has {size} points; give a budget, coarser spans or cma")
    lengths = [len(axis) for axis in axes]
    grid = []
    for number in chosen:
        point = {}
        for name, axis, length in zip(
            reversed(list(spans)), reversed(axes), reversed(lengths), strict=True
        ):
            number, place = divmod(number, length)
            point[name] = axis[place]
        grid.append({name: point[name] for name in spans})
    groups: dict[Any, list[Point]] = {}
    for point in grid:
        groups.setdefault(outer(point), []).append(point)
    return list(itertools.chain.from_iterable(groups.values()))


def _evolve(
    tried: Callable[[Point, int], float],
    spans: Mapping[str, Span],
    budget: int,
    seed: int,
    models: _Models,
) -> None:
    """Run CMA-ES (Hansen, https://arxiv.org/abs/1604.00772) in the unit cube of the spans."""
    cma = optional("cma", "search", 'optimizer="cma"')
    names = list(spans)
    lows = [min(spans[name]) for name in names]
    widths = [max(spans[name]) - low for name, low in zip(names, lows, strict=True)]
    shared = all(models.inner(name) for name in names)
    options = {"bounds": [0, 1], "seed": seed % (1 << 31) + 1, "verbose": -9}  # 0 means the clock
    # CMA-ES needs two axes: a lone parameter gets a mute companion.
    strategy = cma.CMAEvolutionStrategy([0.5] * max(2, len(names)), 0.25, options)
    left = budget
    while left > 0 and not strategy.stop():
        places = strategy.ask()
        losses = []
        for place in places[:left]:
            point = {
                name: float(low + width * x)
                for name, low, width, x in zip(names, lows, widths, place, strict=False)
            }
            value = tried(point, budget if shared else 1)
            losses.append(math.inf if math.isnan(value) else -value)
        left -= len(losses)
        if len(losses) < len(places):
            break
        strategy.tell(places, losses)


def _at_edge(value: float, span: Span) -> bool:
    low, high = min(span), max(span)
    return low < high and min(value - low, high - value) <= 1e-3 * (high - low)

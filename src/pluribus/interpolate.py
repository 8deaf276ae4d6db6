"""Weight interpolation: straight lines between models, model soups, and fine-tuning around them.

    theta(w) = sum_i w_i theta_i,  sum_i w_i = 1        path: theta(l) = l theta_A + (1 - l) theta_B

Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482 (soups); Shukor et al., TMLR 2023,
https://arxiv.org/abs/2307.16184, section 5 (UnIVAL); Rame et al., ICML 2023,
https://arxiv.org/abs/2212.10445 (ratatouille); Choshen et al. 2022,
https://arxiv.org/abs/2204.03044 (fusing). Where all models have a tensor the bits are those of the
merge method `linear`. Everything is lazy: tensors are mixed when they are read.

The module itself is callable: `pluribus.interpolate` is it and its function of that name at once.
"""

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np

from pluribus.core.errors import InputError, MismatchError, listing
from pluribus.core.pool import is_counter
from pluribus.core.source import Source
from pluribus.core.weights import Elementwise, Weights

Missing = Literal["renormalise", "first", "error"]
Models = Sequence[Any] | Mapping[str, Any]
Shares = Sequence[float] | Mapping[str, float] | None
Scores = Callable[[Weights], float | Mapping[str, float]]
GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CHUNK = 1 << 20  # elements


@dataclass(frozen=True)
class _Blend:
    """Weighted sum of blocks, as the merge method `linear` adds it up."""

    weights: tuple[float, ...]
    divisor: float = 1.0

    def __call__(self, *blocks: np.ndarray) -> np.ndarray:
        merged = blocks[0].astype(np.float64) * (self.weights[0] / self.divisor)
        for block, weight in zip(blocks[1:], self.weights[1:], strict=True):
            merged += block.astype(np.float64) * (weight / self.divisor)
        return merged.astype(blocks[0].dtype)


def interpolate(
    models: Models,
    weights: Shares = None,
    *,
    missing: Missing = "renormalise",
    normalize: bool = False,
) -> Weights:
    """Return the weighted sum of models, lazily; without weights their average.

    Weights must sum to 1 unless `normalize` divides by their sum; outside [0, 1] they extrapolate,
    with a warning. A tensor that some models lack: "renormalise" divides by the weights of those
    that have it, "first" lets the first of those stand in for the others, "error" refuses. Whole
    numbers must agree (counters of batch norms come from the first model). Types are those of the
    first model that has the tensor. Raises InputError or MismatchError.
    """
    opened, shares = _opened(models), _shares(models, weights)
    total = math.fsum(shares)
    if abs(total) < 1e-8 and normalize:
        raise InputError(f"weights {list(shares)} sum to zero and cannot be normalised")
    if not normalize and abs(total - 1) > 1e-6:
        raise InputError(
            f"weights {list(shares)} sum to {total:g}, not to 1; correct them, or set "
            "normalize=True"
        )
    outside = [share for share in shares if not 0 <= share <= max(total, 1)]
    if outside:
        warnings.warn(f"weight {outside[0]:g} lies outside [0, 1]: extrapolating", stacklevel=2)
    divisor = sum(shares) if normalize else 1.0
    sources: dict[str, Source] = {}
    names = dict.fromkeys(name for model in opened for name in model.spec)
    for name in names:
        having = [i for i, model in enumerate(opened) if name in model]
        parts = [opened[i].source(name) for i in having]
        _check(name, [opened[i] for i in having], parts)
        if len(having) < len(opened) and missing == "error":
            lacking = [model.label for i, model in enumerate(opened) if i not in having]
            raise MismatchError(
                f"{listing(lacking)} lack the tensor {name!r}; choose missing='renormalise' or "
                "'first'"
            )
        if not parts[0].spec.kind.is_float:
            sources[name] = parts[0]
        elif len(having) == len(opened):
            sources[name] = Elementwise(_Blend(shares, divisor), parts)
        else:
            sources[name] = _partial(name, parts, having, shares, divisor, missing)
    first = opened[0]
    aliases = {
        alias: to
        for alias, to in first.aliases.items()
        if all(model.aliases.get(alias, to) == to and alias not in model.spec for model in opened)
    }
    sources = {name: source for name, source in sources.items() if name not in aliases}
    for alias in first.aliases.keys() - aliases.keys() - sources.keys():
        parts = [model.source(alias) for model in opened if alias in model]
        sources[alias] = Elementwise(_Blend(shares, divisor), parts)
    label = " + ".join(
        f"{share:g} {model.label}" for share, model in zip(shares, opened, strict=True)
    )
    return Weights(sources, label=label, aliases=aliases, folder=first.folder)


def _opened(models: Models) -> list[Weights]:
    if isinstance(models, Mapping):
        opened = [Weights.open(what, label=name) for name, what in models.items()]
    else:
        opened = [Weights.open(what) for what in models]
    if not opened:
        raise InputError("there is no model to interpolate")
    return opened


def _shares(models: Models, weights: Shares) -> tuple[float, ...]:
    """Return one finite weight for each model, in the models' order."""
    count = len(models)
    if weights is None:
        return (1 / count,) * count
    if isinstance(weights, Mapping):
        if not isinstance(models, Mapping) or set(models) != set(weights):
            raise InputError("weights by name need models by the same names")
        weights = [weights[name] for name in models]
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights were given for {count} models")
    shares = tuple(float(weight) for weight in weights)
    if not all(math.isfinite(share) for share in shares):
        raise InputError(f"weights {list(shares)} are not all numbers")
    return shares


def _check(name: str, models: list[Weights], parts: list[Source]) -> None:
    """Raise MismatchError unless tensors can be added up, or, as whole numbers, agree."""
    first = parts[0].spec
    for model, part in zip(models[1:], parts[1:], strict=True):
        if part.spec.shape != first.shape or part.spec.kind.is_float != first.kind.is_float:
            raise MismatchError(
                f"tensor {name!r} is {first} in {models[0].label}, but {part.spec} in {model.label}"
            )
        if first.kind.is_float or is_counter(name) or part.identity == parts[0].identity:
            continue
        if part.spec != first or not np.array_equal(part.load(), parts[0].load()):
            raise MismatchError(
                f"tensor {name!r} holds whole numbers, which differ between {models[0].label} and "
                f"{model.label}; they cannot be interpolated"
            )


def _partial(
    name: str,
    parts: list[Source],
    having: list[int],
    shares: tuple[float, ...],
    divisor: float,
    missing: Missing,
) -> Source:
    """Mix a tensor that only some models have."""
    if len(having) == 1:
        return parts[0]  # both rules give it all the weight
    if missing == "first":
        # The first owner stands in for every model without the tensor.
        lent = [shares[i] for i in having]
        lent[0] += math.fsum(share for i, share in enumerate(shares) if i not in having)
        return Elementwise(_Blend(tuple(lent), divisor), parts)
    present = math.fsum(shares[i] for i in having)
    if abs(present) < 1e-8:
        raise InputError(
            f"the models that have the tensor {name!r} weigh nothing together; choose "
            "missing='first' or other weights"
        )
    return Elementwise(_Blend(tuple(shares[i] for i in having), present), parts)


# -- paths -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One model on a path: the weight of A, and how it scored."""

    weight: float
    score: float  # the mean, if there are several
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """Scores along a path from B (weight 0) to A (weight 1).

    `barrier` is how far the worst point lies on the bad side of the straight line between the ends'
    scores, at least 0. `cosine` is that of the updates, or of the models if no base was given.
    """

    points: tuple[Point, ...]
    best: Point
    barrier: float
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def path(
    a: Any,
    b: Any,
    lambdas: Sequence[float] = GRID,
    score: Scores | None = None,
    *,
    base: Any = None,
    higher_is_better: bool = True,
    barrier_limit: float = 0.1,
    missing: Missing = "renormalise",
) -> Curve:
    """Score l A + (1 - l) B for each l; `score(weights)` gives a number, or several by name.

    Warns if the models seem to come from different initialisations: their updates (weights, without
    a base) are nearly orthogonal and the barrier exceeds `barrier_limit` of the ends' mean score.
    Raises InputError for fewer than two values of l or a score that is not finite.
    """
    if score is None:
        raise InputError("path needs score(weights), a number or several by name")
    values = sorted(float(value) for value in lambdas)
    if len(set(values)) < 2 or len(set(values)) < len(values):
        raise InputError(f"lambdas {list(lambdas)}: give two different values or more")
    one, other = Weights.open(a), Weights.open(b)
    points = []
    for value in values:
        mixed = interpolate([one, other], [value, 1 - value], missing=missing)
        found = score(mixed)
        scores = dict(found) if isinstance(found, Mapping) else {"score": float(found)}
        mean = math.fsum(scores.values()) / max(len(scores), 1)
        if not scores or not math.isfinite(mean):
            raise InputError(f"the score at lambda = {value:g} is {found}")
        points.append(Point(value, mean, scores))
    sign = 1 if higher_is_better else -1
    first, last = points[0], points[-1]
    drops = []
    for point in points:
        along = (point.weight - first.weight) / (last.weight - first.weight)
        line = (1 - along) * first.score + along * last.score
        drops.append(sign * (line - point.score))
    barrier = max(0.0, *drops)
    best = max(points, key=lambda point: sign * point.score)
    cosine = _cosine(one, other, None if base is None else Weights.open(base))
    height = abs(first.score + last.score) / 2
    if abs(cosine) < 0.1 and barrier > barrier_limit * height:
        warnings.warn(
            f"the path between {one.label} and {other.label} crosses a barrier of {barrier:g}, and "
            f"their cosine is {cosine:.2f}: they seem not to come from one initialisation",
            stacklevel=2,
        )
    return Curve(tuple(points), best, barrier, cosine)


def _cosine(one: Weights, other: Weights, base: Weights | None) -> float:
    """Return the cosine between two models, or between their differences from a base."""
    from pluribus.kernels.fold import dot

    inner, left, right = 0.0, 0.0, 0.0
    for name, spec in one.spec.items():
        if not spec.kind.is_float or name not in other or (base is not None and name not in base):
            continue
        for start in range(0, spec.size, CHUNK):
            stop = min(start + CHUNK, spec.size)
            x, y = (w.source(name).floats(start, stop) for w in (one, other))
            if base is not None:
                origin = base.source(name).floats(start, stop)
                x, y = x - origin, y - origin
            inner, left, right = inner + dot(x, y), left + dot(x, x), right + dot(y, y)
    return inner / math.sqrt(left * right) if left and right else 0.0


# -- fine-tuning -----------------------------------------------------------------------------------

Finetune = Callable[[Weights], Any]


def ratatouille(
    auxiliaries: Models, finetune: Finetune, weights: Shares = None, **options: Any
) -> Weights:
    """Fine-tune the target task from each auxiliary model, and average the results.

    `finetune(weights)` returns anything that `Weights.open` takes: a state dict, a module, a path.
    `options` are those of `interpolate`.
    """
    if isinstance(auxiliaries, Mapping):
        tuned: Models = {
            name: finetune(Weights.open(what, label=name)) for name, what in auxiliaries.items()
        }
    else:
        tuned = [finetune(Weights.open(what)) for what in auxiliaries]
    return interpolate(tuned, weights, **options)


def fuse(
    auxiliaries: Models, finetune: Finetune, weights: Shares = None, **options: Any
) -> Weights:
    """Average the auxiliary models, and fine-tune the target task from there."""
    return Weights.open(finetune(interpolate(auxiliaries, weights, **options)))


class _Callable(ModuleType):
    """This module, which is also its function `interpolate`."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Weights:
        """Interpolate; see the function."""
        return interpolate(*arguments, **keywords)


sys.modules[__name__].__class__ = _Callable

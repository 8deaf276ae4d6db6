"""What to look at, and which method to try first: warnings and one recommendation with reasons.

`recommend` names the method that lost least on average over pools that were measured
(`pluribus.inspect.forecast`): on zoos left out it did better than rules of thumb, and a choice by
what is seen in a pool was not reliably better still (claim `recommendation`). Where nothing was
measured that is like the pool, `advise` goes by the rules, written down here so that they can be
argued with. A few rows of one's own tasks decide better than either: `settled` takes what trials
on the pool itself found (`pluribus.inspect.trial`). The rules, in order:

1. An update longer than half of its base (`FAR`) is rarely a fine-tune of that base: settle that.
2. One expert: nothing to reconcile, only how far to go (`task_arithmetic` with a scale).
3. Cosines around `ALIKE` or more: the experts moved together, and an average keeps it (`linear`).
4. The largest differences meet more often than by chance (`CROWDED` times) and disagree there in
   `DISPUTED` of the cases, or supports that oppose each other more than coin tosses would
   (`OPPOSED`): trim and elect signs (`ties`).
5. Nearly orthogonal (|cosine| below `ORTHOGONAL`): the sum keeps each expert's update whole, as
   Ilharco et al. (arXiv:2212.04089) explain; scaled by depth (`lines`, arXiv:2410.17146) if the
   model has numbered blocks.
6. Otherwise `ties`, with `task_arithmetic` to compare.

Independent task vectors disagree in sign on half of the coordinates they share, so a share of
conflicts near 50 % is by itself no reason for anything.
"""

import ast
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pluribus.core.errors import listing
from pluribus.core.pool import Pool
from pluribus.core.source import Source
from pluribus.inspect.tally import Tally, pairs
from pluribus.report.terminal import number

if TYPE_CHECKING:
    from pluribus.inspect.forecast import Forecast, Near
    from pluribus.inspect.trial import Trials

FAR = 0.5  # norm of the task vector over the base's
ALIKE = 0.5  # cosine
ORTHOGONAL = 0.1  # cosine
CROWDED = 2.0  # overlap of supports, over that of independent ones
DISPUTED = 0.35  # share of opposite signs where supports meet
OPPOSED = 0.55
UNEVEN = 4.0  # longest task vector over the shortest
FROZEN = 0.5  # share of unchanged coordinates worth a word

# Keys of config.json that say how a file was written, not what the model computes.
_INCIDENTAL = {
    "_name_or_path", "architectures", "dtype", "eos_token_id", "bos_token_id", "pad_token_id",
    "torch_dtype", "transformers_version", "transformers.js_config", "use_cache",
    "quantization_config", "_attn_implementation_autoset", "unsloth_version", "unsloth_fixed",
}  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """A method to try first, its recipe parameters, and why.

    `expected` are forecasts of all methods that were measured, best first; none: a rule of thumb.
    """

    method: str
    parameters: dict[str, Any]
    reasons: tuple[str, ...]
    expected: "tuple[Forecast, ...]" = ()
    near: "tuple[Near, ...]" = ()  # the measured pools that are most like this one
    tried: bool = False  # on this pool, with a score

    @property
    def basis(self) -> str:
        """What the advice rests on, for people."""
        if self.tried:
            return "kept most of those tried on this pool"
        return "lost least on measured pools" if self.expected else "a rule of thumb"

    @property
    def text(self) -> str:
        """The method as `merge` reads it, such as "ties(density=0.2)"."""
        told = ", ".join(f"{key}={value!r}" for key, value in self.parameters.items())
        return f"{self.method}({told})" if told else self.method


def settled(advice: Advice, trials: "Trials") -> Advice:
    """Return the advice that trials on the pool itself give."""
    best, others = trials.best, trials.tried[1:]
    method, parameters = parsed(best.method)
    reasons = [
        f"its merge keeps {best.kept:.1%} of what the best experts score on "
        f"{listing(list(best.scores), 4)}"
        + (f"; next is {others[0].method} with {others[0].kept:.1%}" if others else "")
    ]
    if best.method != advice.text:
        reasons.append(f"without trials the advice was {advice.text}: {advice.reasons[0]}")
    return replace(advice, method=method, parameters=parameters, reasons=(*reasons,), tried=True)


DEPTH = ("lines",)  # methods that need numbered blocks


def recommend(model: Tally, blocks: int, density: float) -> Advice:
    """Return the method that lost least on measured pools, or the rules' where none is like this.

    `density` is that of the tally's supports; the measured pools had one of their own.
    """
    from pluribus.inspect.features import features
    from pluribus.inspect.forecast import FAR as UNKNOWN
    from pluribus.inspect.forecast import calibrated

    rules = advise(model, blocks, density)
    known = calibrated()
    seen = features(model, density)
    if known is None or seen is None or float(np.nanmax(model.ratio)) > FAR:
        return rules
    fitted, told = known
    if abs(told["density"] - density) > 1e-9:
        return replace(
            rules,
            reasons=(
                *rules.reasons,
                f"expected losses are known for supports of {told['density']:.0%} only",
            ),
        )
    near = tuple(fitted.near(seen))
    if near[0].distance > UNKNOWN:
        return replace(
            rules,
            reasons=(
                *rules.reasons,
                "no pool that was measured is like this one, so no loss is forecast (the nearest, "
                f"{near[0].label}, lies {near[0].distance:.1f} standard deviations away)",
            ),
        )
    found = [
        one
        for one in fitted.predict(seen)
        if blocks >= 2 or one.method.partition("(")[0] not in DEPTH
    ]
    first, second = found[:2]
    method, parameters = parsed(first.method)
    best = ", ".join(f"{one.best} lost {max(one.loss, 0):.0%} in {one.label}" for one in near)
    beds = len({one.bed for one in fitted.pools})
    reasons = [
        f"expected to lose {max(first.loss, 0):.1%} (± {first.spread:.1%}) of the specialists' "
        f"scores, the least on average of {len(found)} methods on {len(fitted.pools)} pools of "
        f"{beds} beds; next is {second.method} with {max(second.loss, 0):.1%}",
        f"on the most similar of these pools: {best}",
        f"the rules of thumb would try {rules.text}: {rules.reasons[0]}",
        "measured on small encoders of images and texts; a validation set decides better",
    ]
    return Advice(method, parameters, (*reasons, *_uneven(model)), tuple(found), near)


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Split "ties(density=0.2)" into a name and its parameters, which are plain values."""
    tree = ast.parse(text, mode="eval").body
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        return tree.func.id, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    return text, {}


def advise(model: Tally, blocks: int, density: float) -> Advice:
    """Return what the rules of thumb try first for a model with `blocks` numbered blocks."""
    t = model.norm.size
    far = float(np.nanmax(model.ratio)) if model.base_square else float("inf")
    if far > FAR:
        reason = (
            f"an expert lies {far:.2f} times the base's norm away from it: methods that add up "
            "differences assume a common base, so find the common base before you trust a merge"
        )
        return Advice("linear", {}, (reason,))
    if t == 1 or not (model.norm > 0).sum() > 1:
        reason = "only one model differs from the base: what is left to choose is how far to go"
        return Advice("task_arithmetic", {"scale": 1.0}, (reason,))
    cosines = pairs(model.cosine)
    mean, largest = float(cosines.mean()), float(np.abs(cosines).max())
    told = f"cosines between task vectors are {_span(cosines, '.2f')}"
    uneven = _uneven(model)
    if mean >= ALIKE:
        reason = f"{told}: the experts moved in one direction, and an average keeps it"
        return Advice("linear", {}, (reason, *uneven))
    chance = density / (2 - density)
    overlap, disputed = pairs(model.overlap), pairs(model.kept_conflict)
    excess = float(overlap.mean()) / chance if overlap.size else 0.0
    opposed = float(disputed.mean()) if disputed.size else 0.0
    where = (
        f"the largest {density:.0%} of two experts' differences meet {excess:.1f} times as often "
        f"as by chance, and have opposite signs in {opposed:.0%} of those places"
    )
    if (excess >= CROWDED and opposed >= DISPUTED) or opposed >= OPPOSED:
        reasons = [told, f"{where}: trimming and electing a sign keeps them from cancelling"]
        return Advice("ties", {"density": density}, (*reasons, *uneven))
    if largest < ORTHOGONAL:
        reasons = [
            f"{told}: nearly orthogonal, so a sum keeps each expert's update whole and signs that "
            "differ on half of the coordinates are chance, not conflict"
        ]
        if blocks >= 2:
            reasons.append(f"the model has {blocks} blocks, so updates can be scaled by depth")
            return Advice("lines", {}, (*reasons, *uneven))
        return Advice("task_arithmetic", {"scale": 0.3}, (*reasons, *uneven))
    reasons = [f"{told}: neither orthogonal nor alike", f"{where}; compare with task_arithmetic"]
    return Advice("ties", {"density": density}, (*reasons, *uneven))


def _uneven(model: Tally) -> list[str]:
    norms = model.norm[model.norm > 0]
    if norms.max() / norms.min() < UNEVEN:
        return []
    return [
        f"the longest task vector is {norms.max() / norms.min():.1f} times the shortest: give the "
        "others larger weights, or the merge will mostly be that expert"
    ]


def warnings(pool: Pool, model: Tally, names: list[str]) -> list[str]:
    """Return what is odd about a pool and its task vectors."""
    out = []
    labels = list(pool.experts)
    for label, norm, ratio in zip(labels, model.norm, model.ratio, strict=True):
        if norm == 0:
            out.append(f"{label} equals the base: it adds nothing to a merge")
        elif ratio > FAR:
            out.append(
                f"{label} lies {ratio:.2f} times the base's norm away from it; a fine-tune usually "
                f"stays below 0.1. Is it really fine-tuned from {_base(pool).label}?"
            )
    for i in range(len(labels)):
        for j in range(i):
            if model.norm[i] > 0 and model.cosine[i, j] > 0.99999:
                same = np.isclose(model.norm[i], model.norm[j], rtol=1e-5)
                what = "are the same model" if same else "differ only in the length of the update"
                out.append(f"{labels[j]} and {labels[i]} {what}")
    moved = pairs(model.cosine)
    if moved.size and moved.min() >= 0.8 and model.ratio.min() > 0:
        out.append(
            f"all task vectors point the same way (cosine {moved.min():.2f} or more): the experts "
            "may share a later ancestor than this base; with that one as base, what they differ in "
            "becomes visible"
        )
    norms = model.norm[model.norm > 0]
    if norms.size > 1 and norms.max() / norms.min() >= UNEVEN:
        longest = labels[int(model.norm.argmax())]
        out.append(
            f"{longest} moved {norms.max() / norms.min():.1f} times as far as the expert that "
            "moved least: with equal weights it will dominate a merge"
        )
    out += _frozen(labels, model) + _types(pool, names) + _configurations(pool)
    return out


def _base(pool: Pool) -> Any:
    assert pool.base is not None
    return pool.base


def _frozen(labels: list[str], model: Tally) -> list[str]:
    still = [
        f"{label} ({share:.0%})"
        for label, share, norm in zip(labels, model.unchanged, model.norm, strict=True)
        if share >= FROZEN and norm > 0
    ]
    if not still:
        return []
    return [
        f"much of the base is unchanged in {listing(still)}: only a part was trained, or updates "
        "fell below the resolution of the element type"
    ]


def _types(pool: Pool, names: list[str]) -> list[str]:
    out = []
    base = _base(pool)
    for label, expert in pool.experts.items():
        kinds = {
            (base.source(name).spec.dtype, expert.source(name).spec.dtype)
            for name in names
            if base.source(name).spec.dtype != expert.source(name).spec.dtype
        }
        if kinds:
            told = listing(sorted(f"{one} and {other}" for one, other in kinds))
            out.append(
                f"base and {label} hold different element types ({told}): rounding counts as a "
                "difference"
            )
    return out


def _configurations(pool: Pool) -> list[str]:
    out = []
    mine = _base(pool).config()
    for label, expert in pool.experts.items():
        theirs = expert.config()
        if not mine or not theirs:
            continue
        keys = [
            key
            for key in dict.fromkeys([*mine, *theirs])
            if key not in _INCIDENTAL and mine.get(key) != theirs.get(key)
        ]
        if keys:
            told = [f"{k} ({_brief(mine.get(k))} → {_brief(theirs.get(k))})" for k in keys]
            out.append(f"config.json of {label} differs from the base's in {listing(told)}")
    return out


def _brief(value: Any) -> str:
    shown = "absent" if value is None else str(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def whole_numbers(pool: Pool) -> list[str]:
    """Return a warning for every integer buffer in which the models differ; merging refuses it."""
    out = []
    models = pool.models
    for name in pool.names:
        first = models[0].source(name)
        if first.spec.kind.is_float:
            continue
        unlike = [m.label for m in models[1:] if not _equal(first, m.source(name))]
        if unlike:
            out.append(
                f"tensor {name} ({first.spec}) holds whole numbers, and {listing(unlike)} differ "
                f"from {models[0].label} in it: a merge will refuse it"
            )
    return out


def _equal(one: Source, other: Source) -> bool:
    step = 1 << 20
    size = one.spec.size
    return all(
        np.array_equal(
            one.load(start, min(start + step, size)), other.load(start, min(start + step, size))
        )
        for start in range(0, size, step)
    )


def _span(values: np.ndarray, form: str) -> str:
    low, high = number(float(values.min()), form), number(float(values.max()), form)
    return low if low == high else f"{low} to {high}"

"""What a pre-trained base changes: the merging claims again, on ImageNet's and MiniLM's weights.

The other beds train their bases from scratch for a moment. Here the base is what somebody
published: EfficientNet-Lite0 with eight image tasks (`vision8_pretrained`), MiniLM with six text
tasks (`text6`). For the time it takes, the grids are coarser than the static claims' own, and
validation is on VAL inputs a task; the inequalities are theirs. All tasks' images are unlike
ImageNet's at 64x64, so the updates of the convolutions are large; the texts are like MiniLM's.

Batch norms: experts of `vision8_pretrained` keep the base's statistics. Beside them stand experts
whose statistics followed their tasks (`statistics="running"`), both kinds of fewer steps: merged
with the base's statistics, with the average's, or with statistics measured anew on unlabelled
inputs of all tasks, or of the one that is scored.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import State
from pluribus.claims.ties import ties
from pluribus.compress import TallMasks
from pluribus.core.pool import Pool
from pluribus.core.registry import MERGERS
from pluribus.core.weights import Weights
from pluribus.engine.driver import merge
from pluribus.renorm import renorm
from pluribus.tasks import zoo as zoos
from pluribus.tune import AdaMerging, ModuleForward

VAL = 100  # inputs a task that choose
SCALES = (0.1, 0.2, 0.3, 0.5, 0.8, 1.1)
MEAN_SCALES = (0.6, 1.0, 1.6, 2.4)  # of methods that divide by how many experts agree
STEPS, LR, BATCH = 30, 1e-2, 16  # of the learned coefficients
RENORM = 8  # batches of 64 for statistics, each of all the tasks they are for
BEDS = {"images": "vision8_pretrained", "texts": "text6"}
SIZES: dict[str, Any] = {"test": 250, "threads": 1}
BRIEF = 20  # steps of the experts whose statistics follow their tasks, and of those beside them


def _checks(bed: str) -> tuple[Check, ...]:
    told = (
        ("TIES (density 0.2, lambda 1, untuned) over the average", "ties_untuned", "average", 3.0),
        ("TIES (sum) tuned over task arithmetic tuned", "ties_sum", "task_arithmetic", 0.0),
        ("PCB tuned over TIES (sum) tuned", "pcb", "ties_sum", 0.5),
        ("LiNeS on task arithmetic over task arithmetic tuned", "lines", "task_arithmetic", 0.0),
        ("breadcrumbs tuned over task arithmetic tuned", "breadcrumbs", "task_arithmetic", 0.0),
        ("consensus tuned over task arithmetic tuned", "consensus", "task_arithmetic", 0.0),
        ("TALL masks give back the experts", "tall_masks", None, 97.0),
        ("AdaMerging (test inputs) over the best static merge", "adamerging", "best_static", 0.0),
        ("AdaMerging by agreement with the experts: the same", "adamerging_kl", "best_static", 0.0),
        ("tuned task arithmetic over the base", "task_arithmetic", "base", 0.0),
    )
    return tuple(
        Check(
            text=f"{bed}: {text}",
            left=f"{bed}_{left}",
            right=right and f"{bed}_{right}",
            margin=margin,
            asserted=False,
        )
        for text, left, right, margin in told
    )


CLAIM = Claim(
    name="pretrained-bases",
    title="What published weights as the base change for merging (measured, nothing asserted)",
    paper="arXiv:2306.01708",
    data="vision8_pretrained: eight real image sets at 64x64; text6: six real text "
    "sets; 250 test inputs each",
    model="EfficientNet-Lite0 (3.4 M, ImageNet); MiniLM-L6 (22 M, of which 11 M are tuned)",
    metric="test accuracy over the specialist's own, mean of the tasks, percent",
    checks=(
        *_checks("images"),
        *_checks("texts"),
        *(
            Check(text=f"images, brief experts: {text}", left=left, right=right, asserted=False)
            for text, left, right in (
                ("statistics that follow the task over the base's", "running_own", "frozen_own"),
                ("those merged, base's statistics, over frozen", "running_base", "frozen_base"),
                (
                    "those merged, averaged statistics, over frozen",
                    "running_averaged",
                    "frozen_base",
                ),
                (
                    "those merged, measured anew on all tasks, over averaged",
                    "running_averaged_anew",
                    "running_averaged",
                ),
                (
                    "those merged, measured anew on the task alone, over averaged",
                    "running_averaged_anew_by_task",
                    "running_averaged",
                ),
                (
                    "frozen merged, measured anew on all tasks, over kept",
                    "frozen_base_anew",
                    "frozen_base",
                ),
                (
                    "frozen merged, measured anew on the task alone, over kept",
                    "frozen_base_anew_by_task",
                    "frozen_base",
                ),
            )
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    out: dict[str, float] = {}
    for bed, name in BEDS.items():
        zoo = zoos.build(name, seed, on_step=on_step, **SIZES)
        out |= {f"{bed}_{key}": value for key, value in merges(zoo, seed, on_step).items()}
    return out | norms(seed, on_step)


def merges(zoo: zoos.Zoo, seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return the normalised scores of static and learned merges of one zoo."""
    pool = Pool(zoo.base, zoo.experts)
    plain = MERGERS.build("task_arithmetic", {"weight": 1.0})
    crumbs = {"density": 0.85, "gamma": 0.01, "scope": "row", "weight": 1.0}
    grids: dict[str, tuple[Any, tuple[float, ...]]] = {
        "task_arithmetic": (plain, SCALES),
        "ties_mean": (ties(), MEAN_SCALES),
        "ties_sum": (ties(agg="sum"), SCALES),
        "breadcrumbs": (MERGERS.build("breadcrumbs", crumbs), SCALES),
        "consensus": (MERGERS.build("consensus", {"k": 2, "lambda": 1.0}), SCALES),
        "pcb": (MERGERS.build("pcb", {"ratio": 0.1, "lambda": 1.0}), MEAN_SCALES),
    }
    chosen: dict[str, tuple[float, State]] = {}
    for name, (method, grid) in grids.items():
        update = _update(zoo, merge(pool, method))
        chosen[name] = best(zoo, (_at(zoo, update, scale) for scale in grid))
        if on_step is not None:
            on_step(f"{zoo.name}: merges", len(chosen), len(grids) + 1)
    low, high = (_update(zoo, merge(pool, _lines(plain, beta))) for beta in (0.0, 1.0))
    chosen["lines"] = best(
        zoo, (_at(zoo, {n: low[n] + b * (high[n] - low[n]) for n in low}, 1.0) for b in SCALES)
    )
    states = {name: state for name, (_, state) in chosen.items()}
    static = max(chosen, key=lambda name: chosen[name][0])
    states |= {
        "base": zoo.base,
        "average": dict(merge(pool, "linear")),
        "ties_untuned": dict(merge(pool, ties())),
    }
    for name, objective, split in (
        ("adamerging", "entropy", "test"),
        ("adamerging_kl", "kl", "train"),
    ):
        streams = {t: zoo.unlabelled(t, split, BATCH, seed) for t in zoo.tasks}  # type: ignore[arg-type]
        forward = ModuleForward(zoo.module(), zoo.heads)
        tuned = AdaMerging(steps=STEPS, lr=LR).fit(
            pool, forward, streams, objective=objective, on_step=on_step
        )
        states[name] = dict(tuned.weights)
    out = {name: score(zoo, state) for name, state in states.items()}
    out["best_static"] = out[static]
    return out | {"own": _own(zoo), "tall_masks": restored(zoo)}


def score(zoo: zoos.Zoo, state: Mapping[str, Tensor], split: Any = "test") -> float:
    """Return the mean normalised accuracy, in percent."""
    shares = zoo.normalised(state, split, VAL if split == "val" else None)
    return 100 * sum(shares.values()) / len(shares)


def best(zoo: zoos.Zoo, states: Iterable[State]) -> tuple[float, State]:
    """Return the weights with the best validation score, and that score."""
    return max(((score(zoo, s, "val"), s) for s in states), key=lambda pair: pair[0])


def restored(zoo: zoos.Zoo) -> float:
    """Return the normalised score of what a bank of TALL masks gives back."""

    def validated(task: str, weights: Weights) -> float:
        return zoo.score({name: weights[name] for name in weights}, task, "val", VAL)

    bank = TallMasks().fit(zoo.base, zoo.experts, score=validated)
    own = zoo.expert_scores()
    shares = [zoo.score(dict(bank.expand(task)), task) / own[task] for task in zoo.tasks]
    return 100 * sum(shares) / len(shares)


def norms(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return what the statistics of batch norms do to a task arithmetic whose scale is tuned.

    Scores are over the experts' with the base's statistics, so that the two kinds compare.
    """
    plain = MERGERS.build("task_arithmetic", {"weight": 1.0})
    out: dict[str, float] = {}
    own: dict[str, float] = {}
    for kind in ("frozen", "running"):
        zoo = zoos.build(
            "vision8_pretrained", seed, statistics=kind, steps=BRIEF, on_step=on_step, **SIZES
        )
        own = own or zoo.expert_scores()
        out[f"{kind}_own"] = _mean(zoo.expert_scores(), own)
        update = _update(zoo, merge(Pool(zoo.base, zoo.experts), plain))
        left = {n: zoo.base[n] for n in zoo.base if ".running_" in n or "num_batches" in n}
        averaged = {n: t + update[n] / len(zoo.experts) for n, t in left.items()}
        for name, kept in (("base", left), ("averaged", averaged)):
            if kind == "frozen" and name == "averaged":
                continue  # the same
            chosen = best(zoo, (_at(zoo, update, s) | kept for s in SCALES))[1]
            out[f"{kind}_{name}"] = _mean(zoo.scores(chosen), own)
            every = anew(zoo, chosen, zoo.tasks, seed)
            out[f"{kind}_{name}_anew"] = _mean(zoo.scores(every), own)
            each = {t: zoo.score(anew(zoo, chosen, [t], seed), t) for t in zoo.tasks}
            out[f"{kind}_{name}_anew_by_task"] = _mean(each, own)
    return out


def anew(zoo: zoos.Zoo, state: State, tasks: Collection[str], seed: int) -> State:
    """Return the weights with statistics measured on unlabelled training inputs of some tasks."""
    share = 64 // len(tasks)
    streams = [zoo.unlabelled(task, "train", share, seed) for task in tasks]
    module = zoo.module(state)
    renorm(module, (torch.cat([next(stream) for stream in streams]) for _ in range(RENORM)))
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _update(zoo: zoos.Zoo, merged: Mapping[str, Tensor]) -> State:
    return {name: merged[name] - tensor for name, tensor in zoo.base.items()}


def _at(zoo: zoos.Zoo, update: State, scale: float) -> State:
    return {name: tensor + scale * update[name] for name, tensor in zoo.base.items()}


def _lines(plain: object, beta: float) -> object:
    return MERGERS.build("lines", {"of": plain, "beta": beta})


def _own(zoo: zoos.Zoo) -> float:
    own = zoo.expert_scores()
    return 100 * sum(own.values()) / len(own)


def _mean(scores: Mapping[str, float], own: Mapping[str, float]) -> float:
    return 100 * sum(score / own[task] for task, score in scores.items()) / len(own)

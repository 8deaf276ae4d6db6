"""TALL masks: every expert from one vector and a bit mask; consensus drops selfish weights."""

import torch

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import DATA, METRIC, MODEL, Bed, State, merge8
from pluribus.compress import TallMasks
from pluribus.core.registry import MERGERS
from pluribus.core.weights import Weights

TIES_SUM = "trim(density=0.2) >> elect >> sum"

CLAIM = Claim(
    name="tall-masks",
    title="Masks over one vector give each expert back; consensus improves merging",
    paper="arXiv:2405.07813",
    data=DATA,
    model=MODEL,
    metric=METRIC,
    checks=(
        Check(text="TALL masks on task arithmetic", left="tall_ta", margin=97.0),
        Check(text="TALL masks on TIES", left="tall_ties", margin=97.0),
        Check(
            text="bytes with the base, percent of eight checkpoints",
            left="storage",
            margin=35.0,
            at_most=True,
            each=True,
        ),
        Check(
            text="TALL masks over random masks of the same density",
            left="tall_ta",
            right="random_masks",
            margin=8.0,
        ),
        Check(
            text="consensus over task arithmetic, both tuned",
            left="consensus_ta",
            right="task_arithmetic",
            margin=0.2,
        ),
        Check(
            text="consensus over task arithmetic, on every seed",
            left="consensus_ta",
            right="task_arithmetic",
            margin=-0.5,
            each=True,
        ),
        Check(
            text="consensus over TIES (sum), both tuned",
            left="consensus_ties",
            right="ties_sum",
            margin=0.2,
        ),
        Check(
            text="consensus over TIES (sum), on every seed",
            left="consensus_ties",
            right="ties_sum",
            margin=-0.5,
            each=True,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    bed = merge8(seed, on_step)
    banks = {"tall_ta": bank(bed, "sum"), "tall_ties": bank(bed, TIES_SUM)}
    out = {name: restored(bed, found) for name, found in banks.items()}
    report = banks["tall_ta"].report()
    density = [told["density"] for told in report["tasks"].values()]
    out |= {
        "storage": 100 * report["ratio"],
        "mask_density": 100 * sum(density) / len(density),
        "random_masks": random_masks(bed, banks["tall_ta"], seed),
        "task_arithmetic": bed.tuned(MERGERS.build("task_arithmetic", {"weight": 1.0})),
        "ties_sum": bed.tuned(TIES_SUM),
        "consensus_ta": bed.tuned(consensus(banks["tall_ta"], bed, "task_arithmetic")),
        "consensus_ties": bed.tuned(consensus(banks["tall_ties"], bed, TIES_SUM)),
    }
    return out


def bank(bed: Bed, multi: str):
    """Return the bank whose mask thresholds are chosen on validation data."""

    def score(task: str, weights: Weights) -> float:
        return bed.zoo.score({name: weights[name] for name in weights}, task, "val")

    return TallMasks(multi=multi).fit(bed.zoo.base, bed.zoo.experts, score=score)


def consensus(found, bed: Bed, multi: str) -> object:
    """Return the merge that keeps what two experts need, with the bank's thresholds."""
    lambdas = tuple(found.report()["tasks"][task]["mask_lambda"] for task in bed.tasks)
    return MERGERS.build(
        "consensus", {"multi": multi, "k": 2, "mask_lambda": lambdas, "lambda": 1.0}
    )


def restored(bed: Bed, found) -> float:
    """Return the mean normalised score of the experts that a bank gives back."""
    ceilings = bed.zoo.expert_scores("test")
    scores = []
    for task in bed.tasks:
        weights = found.expand(task)
        state: State = {name: weights[name] for name in weights}
        scores.append(bed.zoo.score(state, task) / ceilings[task])
    return 100 * sum(scores) / len(scores)


def random_masks(bed: Bed, found, seed: int) -> float:
    """Return the same with random masks as dense as the bank's."""
    draw = torch.Generator().manual_seed(seed)
    told = found.report()["tasks"]
    update = bed.update("sum")
    ceilings = bed.zoo.expert_scores("test")
    scores = []
    for task in bed.tasks:
        state = {
            name: bed.zoo.base[name]
            + tau * (torch.rand(tau.shape, generator=draw) < told[task]["density"])
            for name, tau in update.items()
        }
        scores.append(bed.zoo.score(state, task) / ceilings[task])
    return 100 * sum(scores) / len(scores)

"""IBCL answers any preference between tasks from three trainings a task, near joint retraining.

The page's bed: Fashion-MNIST as five binary tasks {2i vs 2i+1} with one shared logistic head on 128
principal components, so that tasks do conflict. Deviations: the stored set has 10,000 training and
2,000 test images where the page measured on 20,000, so three epochs are half as many steps; the
figures at six epochs are reported beside. The page asserts sweeps that never fall; here a test set
has 400 images, and one of them may. Components are fitted on training images and divided by
one number, their overall standard deviation. Seeds draw batches, weight samples and preferences;
the images stay.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations

import torch
from torch import nn

from pluribus.claims import Check, Claim, OnStep
from pluribus.tasks.sets import images
from pluribus.tasks.specialise import threads
from pluribus.train.continual import (
    AccuracyTable,
    CredalBase,
    GradientEpisodicMemory,
    Inference,
    Rehearsal,
    SequentialPosterior,
    backward_transfer,
    joint,
    prefer,
)
from pluribus.train.continual import measure as table_of
from pluribus.train.continual.network import Labelled

Data = dict[str, Labelled]
WIDTH, PREFERENCES, RETRAINED, MEMORY = 128, 20, 10, 100
NET = partial(nn.Linear, WIDTH, 1)
HOW = Inference(kl_weight="elbo", epochs=3, lr=5e-3)
VARIANTS = {  # the first is the default
    "prior_start": HOW,
    "official_start": replace(HOW, warm_start=False),
    "official": replace(HOW, warm_start=False, kl_weight=1.0),
    "prior_start_6_epochs": replace(HOW, epochs=6),
}

CLAIM = Claim(
    name="ibcl",
    title="Any preference between tasks is answered without training, near joint retraining",
    paper="arXiv:2310.02995",
    data="Fashion-MNIST, 10,000 training and 2,000 test images, as five binary tasks 2i vs 2i+1",
    model="logistic regression on 128 principal components; mean of the preference's Gaussian",
    metric="accuracy weighted by the preference, mean of 20 random ones, percent",
    checks=(
        Check(
            text="official start: IBCL over the sequential posterior",
            left="ibcl_official_start",
            right="sequential_official_start",
            margin=10.0,
            each=True,
        ),
        Check(
            text="prior start: IBCL over the sequential posterior",
            left="ibcl_prior_start",
            right="sequential_prior_start",
            margin=1.0,
            asserted=False,
        ),
        Check(
            text="prior start, six epochs (the page's number of steps): the same",
            left="ibcl_prior_start_6_epochs",
            right="sequential_prior_start_6_epochs",
            margin=1.0,
            asserted=False,
        ),
        Check(
            text="prior start, preferences for one task alone: IBCL over the sequential posterior",
            left="own_task",
            right="own_task_sequential",
            margin=1.0,
            each=True,
        ),
        Check(
            text="IBCL against joint retraining for each of 10 preferences",
            left="ibcl_10",
            right="joint_10",
            margin=-4.0,
            each=True,
        ),
        Check(
            text="optimiser steps: joint retraining for 10 preferences over IBCL's for all",
            left="step_ratio_10",
            margin=3.0,
            each=True,
        ),
        Check(
            text="sweeps of five points from one task to another: percent of 20 that never fall by "
            "more than one test image",
            left="rising_sweeps",
            margin=90.0,
            asserted=False,  # the tolerance was chosen after a look at seed 0
        ),
        Check(
            text="the same: percent that never fall at all",
            left="monotone_sweeps",
            margin=90.0,
            asserted=False,
        ),
        Check(
            text="backward transfer for w = e_l, no threshold, largest size",
            left="backward_transfer",
            margin=0.0,
            at_most=True,
            each=True,
        ),
        Check(
            text="backward transfer for w = e_l, d_thr 0.01, largest size",
            left="backward_transfer_reused",
            margin=2.0,
            at_most=True,
            each=True,
        ),
        Check(
            text="own-task accuracy that reuse (d_thr 0.01) costs",
            left="own_task",
            right="own_task_reused",
            margin=2.0,
            at_most=True,
            asserted=False,
        ),
        Check(
            text="stored points: without a threshold over d_thr 0.01",
            left="points",
            right="points_reused",
            margin=0.0,
            each=True,
        ),
        Check(
            text="average per-task accuracy: IBCL (10 models each) over rehearsal, 10 preferences",
            left="average",
            right="average_rehearsal",
            asserted=False,
        ),
        Check(
            text="peak per-task accuracy: IBCL (10 models each) over rehearsal, 10 preferences",
            left="peak",
            right="peak_rehearsal",
            asserted=False,
        ),
        Check(
            text="prior start: IBCL over GEM",
            left="ibcl_prior_start",
            right="gem",
            asserted=False,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    show = on_step or (lambda stage, done, total: None)
    with threads(1):  # another count sums in another order; the networks are too small for more
        train, test = tasks()
        out, base = starts(train, test, seed, show)
        wanted = [row["preference"] for row in base.front(RETRAINED, test).rows()]
        out |= answers(base, train, test, wanted, seed, show)
        few, forgotten = learned(train, test, HOW, seed, d_thr=0.01)
        own = [few.network.accuracy(few.mean({task: 1.0}), test[task]) for task in few.tasks]
        falls = sweeps(base, test)
        out |= {
            "backward_transfer_reused": 100 * abs(forgotten),
            "own_task_reused": 100 * sum(own) / len(own),
            "ibcl_reused": 100 * few.front(PREFERENCES, test).weighted(),
            "points": len(base.points),
            "points_reused": len(few.points),
            "rising_sweeps": 100 * sum(fall <= 1 for fall in falls) / len(falls),
            "monotone_sweeps": 100 * sum(fall <= 0 for fall in falls) / len(falls),
            "deepest_fall_images": max(falls),
        }
        show("reuse and sweeps", 1, 1)
    return {name: float(value) for name, value in out.items()}


def tasks() -> tuple[Data, Data]:
    """Return training and test data by task, on the training images' principal components."""
    found = images("fashion_mnist")
    x, x_test = (
        torch.from_numpy(part).float().flatten(1) / found.peak
        for part in (found.x_train, found.x_test)
    )
    mean = x.mean(0)
    spread = torch.linalg.eigh(((x - mean).T @ (x - mean)).double())
    basis = spread.eigenvectors.flip(1)[:, :WIDTH].float()
    scale = ((x - mean) @ basis).std()
    out: list[Data] = []
    for part, labels in ((x, found.y_train), (x_test, found.y_test)):
        z, y = (part - mean) @ basis / scale, torch.from_numpy(labels).long()
        chosen = {f"{2 * i}v{2 * i + 1}": y // 2 == i for i in range(5)}
        out.append({name: Labelled(z[rows], y[rows] % 2) for name, rows in chosen.items()})
    return out[0], out[1]


def learned(
    train: Data, test: Data, how: Inference, seed: int, d_thr: float = 0.0
) -> tuple[CredalBase, float]:
    """Return a knowledge base of all tasks, and its backward transfer for w = e_l."""
    base = CredalBase(
        NET,
        d_thr=d_thr,
        kl_weight=how.kl_weight,
        warm_start=how.warm_start,
        epochs=how.epochs,
        lr=how.lr,
        seed=seed,
    )
    history = torch.zeros(len(train), len(train))
    for i, (name, data) in enumerate(train.items()):
        base.learn(name, data)
        for k, task in enumerate(base.tasks):
            history[i, k] = base.network.accuracy(base.mean({task: 1.0}), test[task])
    return base, backward_transfer(history)


def starts(train: Data, test: Data, seed: int, show: OnStep) -> tuple[dict[str, float], CredalBase]:
    """Compare with the sequential posterior for each way to begin; return the default's base."""
    out: dict[str, float] = {}
    bases: list[CredalBase] = []
    for variant, how in VARIANTS.items():
        base, forgotten = learned(train, test, how, seed)
        chain = SequentialPosterior(NET, 0.25, how, seed=seed)
        for name, data in train.items():
            chain.learn(name, data)
        front = base.front(PREFERENCES, test)
        wanted = [row["preference"] for row in front.rows()]
        single = table_of(chain.model, wanted, test, chain.network.accuracy)
        out[f"ibcl_{variant}"] = 100 * front.weighted()
        out[f"sequential_{variant}"] = 100 * single.weighted()
        bases.append(base)
        if how == HOW:
            own = [chain.network.accuracy(chain.posterior.mu, data) for data in test.values()]
            out["own_task_sequential"] = 100 * sum(own) / len(own)
            out["backward_transfer"] = 100 * abs(forgotten)
        show("starts", len(bases), len(VARIANTS))
    return out, bases[0]


def answers(
    base: CredalBase,
    train: Data,
    test: Data,
    wanted: list[dict[str, float]],
    seed: int,
    show: OnStep,
) -> dict[str, float]:
    """Compare with what trains for each preference, and with GEM."""
    score = base.network.accuracy
    steps, retrained, rehearsed = 0, [], []
    rehearsal = Rehearsal(NET, 0.25, HOW, memory=MEMORY, seed=seed)
    gem = GradientEpisodicMemory(NET, HOW, memory=MEMORY, seed=seed)
    for name, data in train.items():
        rehearsal.learn(name, data)
        gem.learn(name, data)
    for number, preference in enumerate(wanted):
        found = joint(NET, train, preference, HOW, seed=seed)
        steps += found.steps
        retrained.append(found.state)
        rehearsed.append(rehearsal.train(preference))
        show("preferences", number + 1, len(wanted))
    at_once = given(retrained, wanted, test, base)
    again = given(rehearsed, wanted, test, base)
    ours, sampled = base.front(wanted, test), base.front(wanted, test, models=10)
    own = [score(base.mean(prefer(name, 1.0, base.tasks)), data) for name, data in test.items()]
    alone = [score(gem.state, data) for data in test.values()]
    shares = torch.tensor([list(preference.values()) for preference in wanted])
    return {
        "ibcl_10": 100 * ours.weighted(),
        "joint_10": 100 * at_once.weighted(),
        "rehearsal_10": 100 * again.weighted(),
        "gem": 100 * float((shares @ torch.tensor(alone)).mean()),
        "step_ratio_10": steps / base.cost().steps,
        "average": 100 * sampled.average(),
        "average_max": 100 * sampled.average("max"),
        "peak": 100 * sampled.peak(),
        "average_rehearsal": 100 * again.average(),
        "peak_rehearsal": 100 * again.peak(),
        "own_task": 100 * sum(own) / len(own),
        "own_task_worst": 100 * min(own),
    }


def given(
    states: list[dict[str, torch.Tensor]],
    wanted: list[dict[str, float]],
    test: Data,
    base: CredalBase,
) -> AccuracyTable:
    """Return the table of models that were trained one a preference."""
    by_preference = {tuple(p.values()): s for p, s in zip(wanted, states, strict=True)}

    def answer(preference: Mapping[str, float]) -> list[dict[str, torch.Tensor]]:
        return [by_preference[tuple(preference.values())]]

    return table_of(answer, wanted, test, base.network.accuracy)


def sweeps(base: CredalBase, test: Data) -> list[int]:
    """Return the deepest fall on the rising task, in test images, of every ordered pair's sweep."""
    out = []
    for start, task in permutations(base.tasks, 2):
        right = [
            round(base.network.accuracy(state, test[task]) * len(test[task].y))
            for _, state in base.sweep(task, 5, {start: 1.0})
        ]
        out.append(max(before - after for before, after in pairwise(right)))
    return out

"""aTLAS: coefficients by block beat one a task vector, and few shots beat fine-tuning.

The pool is unusually relevant: five close views of the same images and one set of digits, so a new
task is nearly a mixture of the others. The published margins, on 22 unrelated data sets under CLIP,
cannot be had here. For the time it takes, addition and budget are measured on the harder bed alone,
and few-shot learning on one target a seed, three over the seeds, without augmentation.

The paper's heads come from class names and have not seen the shots. Here the other views have the
same classes, so the mean of their heads is such a head for the target. A head of the shots' own
class means is reported beside it: it names the shots rightly before anything is learned, and leaves
little for them to teach.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import State
from pluribus.core.pool import Pool
from pluribus.tasks import zoo as zoos
from pluribus.tasks.heads import class_means
from pluribus.tasks.views import Split
from pluribus.tasks.zoos.vision6 import HARDER
from pluribus.tune._adapters import LpPlusPlus, Shots, Tip
from pluribus.tune.atlas import Atlas

LABELLED = 200  # validation images a task that (a) and (c) learn from, and choose by
EPOCHS, STEPS_PER_EPOCH = 15, 10
LR = 1e-2
GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
TARGETS = ("rot180", "inverted", "rolled")  # one a seed, in turn
SHOTS = 4  # of each class
HELD = 200  # validation images by which (b) chooses rates and epochs
RATES = {"atlas": (0.01, 0.03, 0.1), "fine_tuned": (1e-4, 3e-4, 1e-3)}
TUNED_STEPS, TUNED_EVERY = 40, 4  # of fine-tuning; an epoch of all shots is one step

CLAIM = Claim(
    name="atlas",
    title="A coefficient for each block of each task vector learns from few labels",
    paper="arXiv:2407.02880",
    data=(
        "vision6: ten classes of Fashion-MNIST under five views, and digits, 600 test each (few-"
        "shot: five classes); a pool unusually relevant to each of its tasks"
    ),
    model="small vision transformer; base trained jointly for a moment, six fine-tunes of it",
    metric="top-1 accuracy on held-out test images, percent",
    checks=(  # asserted is what was seen to hold on three seeds
        Check(
            text=f"addition, {LABELLED} labels a task: by block over one a task vector",
            left="block",
            right="vector",
            margin=2.0,
        ),
        Check(
            text="addition: by block over the best single scale of a grid",
            left="block",
            right="best_scale",
            margin=2.0,
        ),
        Check(
            text=f"few-shot ({SHOTS} a class, own expert left out): over the base",
            left="few_shot_atlas",
            right="few_shot_base",
            margin=3.0,
        ),
        Check(
            text="few-shot: over fine-tuning all weights on the same shots",
            left="few_shot_atlas",
            right="few_shot_fine_tuned",
            asserted=False,
        ),
        Check(
            text="few-shot: numbers that train",
            left="few_shot_numbers",
            margin=1000.0,
            at_most=True,
            each=True,
        ),
        Check(
            text="half of the blocks, by gradient: over all of them",
            left="budget_gradient",
            right="block",
            margin=-1.5,
            asserted=False,
        ),
        Check(
            text="half of the blocks: by gradient over at random",
            left="budget_gradient",
            right="budget_random",
            asserted=False,
        ),
        Check(
            text="few-shot, head of the shots' class means: over the base",
            left="means_atlas",
            right="means_base",
            margin=3.0,
            asserted=False,
        ),
        Check(
            text="few-shot, head of the shots' class means: over fine-tuning",
            left="means_atlas",
            right="means_fine_tuned",
            asserted=False,
        ),
        Check(
            text="few-shot: Tip on top over without",
            left="few_shot_tip",
            right="few_shot_atlas",
            asserted=False,
        ),
        Check(
            text="few-shot: LP++ on top over without",
            left="few_shot_lp_plus_plus",
            right="few_shot_atlas",
            asserted=False,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    torch.manual_seed(seed)  # nothing below draws from it; a stray draw would still repeat
    return {**addition(seed, on_step), **few_shot(seed, on_step)}


def addition(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Learn all tasks at once: by block, by task vector, with half of the blocks."""
    zoo = zoos.build("vision6", seed, on_step=on_step, **HARDER)
    pool = Pool(zoo.base, zoo.experts)
    learned = {task: data.val.first(LABELLED) for task, data in zoo.tasks.items()}

    def score(**settings: Any) -> float:
        method = Atlas(lr=LR, epochs=EPOCHS, steps_per_epoch=STEPS_PER_EPOCH, seed=seed, **settings)
        tuned = method.fit(pool, zoo.forward, learned, on_step=on_step)
        return _mean(zoo.scores(dict(tuned.weights)))

    half = len(zoo.experts) // 2
    return {
        "base": _mean(zoo.scores(zoo.base)),
        "own": _mean(zoo.expert_scores()),
        "best_scale": best_scale(zoo),
        "vector": score(scope="vector"),
        "block": score(),
        "budget_gradient": score(budget=half),
        "budget_random": score(budget=half, budget_by="random"),
    }


def best_scale(zoo: zoos.Zoo) -> float:
    """Return the test score of the sum of updates whose scale did best on the same images."""
    update = {
        name: torch.stack([expert[name] - base for expert in zoo.experts.values()]).sum(0)
        for name, base in zoo.base.items()
    }
    states = [{n: zoo.base[n] + scale * update[n] for n in update} for scale in GRID]
    chosen = max(states, key=lambda state: _mean(zoo.scores(state, "val", LABELLED)))
    return _mean(zoo.scores(chosen))


def few_shot(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Learn a task that neither base nor experts have seen, from a few shots of each class."""
    target = TARGETS[seed % len(TARGETS)]
    zoo = zoos.build("vision6", seed, without=target, on_step=on_step)
    data = zoo.left_out[target]
    shots, held = shots_of(data.train, SHOTS), data.val.first(HELD)
    means = class_means(zoo.features(zoo.base, shots.x), shots.y, len(data.classes))
    average = heads_mean(zoo, data.classes)
    named = zoo.with_head(target, average["weight"], average["bias"])
    of_means = zoo.with_head(target, means["weight"], means["bias"])
    learned, found = from_shots(named, target, shots, held, seed)
    _, beside = from_shots(of_means, target, shots, held, seed)

    def seen(split: Split) -> Shots:
        features = named.features(learned, split.x)
        return Shots(features, named.logits(learned, target, split.x), split.y)

    parts = [seen(split) for split in (shots, held, data.test)]
    adapters = {"tip": Tip(seed=seed), "lp_plus_plus": LpPlusPlus(seed=seed)}
    for name, method in adapters.items():
        found[name] = 100 * method.fit(parts[0], parts[1]).accuracy(parts[2])
    return {
        "few_shot_numbers": len(zoo.base) * len(zoo.experts),
        **{f"few_shot_{name}": value for name, value in found.items()},
        **{f"means_{name}": value for name, value in beside.items()},
    }


def heads_mean(zoo: zoos.Zoo, classes: Sequence[str]) -> State:
    """Return the mean of the heads of all tasks with these classes."""
    heads = [zoo.heads[task] for task, data in zoo.tasks.items() if data.classes == classes]
    return {name: torch.stack([head[name] for head in heads]).mean(0) for name in heads[0]}


def from_shots(
    zoo: zoos.Zoo, target: str, shots: Split, held: Split, seed: int
) -> tuple[State, dict[str, float]]:
    """Return aTLAS's weights, and the scores of base, aTLAS and fine-tuning."""
    state = adapted(zoo, target, shots, held, seed)
    return state, {
        "base": 100 * zoo.score(zoo.base, target),
        "atlas": 100 * zoo.score(state, target),
        "fine_tuned": 100 * zoo.score(fine_tuned(zoo, target, shots, held), target),
    }


def shots_of(split: Split, count: int) -> Split:
    """Return the first examples of each class that occurs."""
    x, y = split
    rows = torch.cat([(y == label).nonzero().flatten()[:count] for label in y.unique()])
    return Split(x[rows], y[rows])


def adapted(zoo: zoos.Zoo, target: str, shots: Split, held: Split, seed: int) -> State:
    """Return what aTLAS makes of the shots at the rate that validation prefers."""
    pool = Pool(zoo.base, zoo.experts)
    found: list[tuple[float, State]] = []
    for lr in RATES["atlas"]:
        method = Atlas.few_shot(lr=lr, seed=seed)
        tuned = method.fit(pool, zoo.forward, {target: shots}, validation={target: held})
        state = dict(tuned.weights)
        found.append((_accuracy(zoo.logits(state, target, held.x), held.y), state))
    return max(found, key=lambda pair: pair[0])[1]


def fine_tuned(zoo: zoos.Zoo, target: str, shots: Split, held: Split) -> State:
    """Return what AdamW on all weights makes of them, rate and step chosen in the same way."""
    best = (_accuracy(zoo.logits(zoo.base, target, held.x), held.y), zoo.base)
    for lr in RATES["fine_tuned"]:
        state = {name: tensor.clone().requires_grad_() for name, tensor in zoo.base.items()}
        optimiser = torch.optim.AdamW(state.values(), lr=lr)
        for step in range(1, TUNED_STEPS + 1):
            loss = cross_entropy(zoo.forward(state, shots.x, target), shots.y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % TUNED_EVERY == 0:
                now = {name: tensor.detach().clone() for name, tensor in state.items()}
                score = _accuracy(zoo.logits(now, target, held.x), held.y)
                best = max(best, (score, now), key=lambda pair: pair[0])
    return best[1]


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


def _mean(scores: Mapping[str, float]) -> float:
    return 100 * sum(scores.values()) / len(scores)

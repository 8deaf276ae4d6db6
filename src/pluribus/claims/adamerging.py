"""AdaMerging finds coefficients from unlabelled inputs that beat every single labelled one."""

from collections.abc import Mapping
from typing import Any

from pluribus.claims import Check, Claim, OnStep
from pluribus.core.pool import Pool
from pluribus.engine.driver import merge
from pluribus.tasks import zoo as zoos
from pluribus.tune import AdaMerging, ModuleForward

GRID = (0.1, 0.2, 0.3, 0.4, 0.5)
STEPS, LR, BATCH = 100, 2e-3, 32

CLAIM = Claim(
    name="adamerging",
    title="Coefficients learned from unlabelled inputs beat the best single one",
    paper="arXiv:2310.02575",
    data="vision6: Fashion-MNIST (5 classes) under five transforms, and scikit-learn's digits",
    model="patch transformer of 0.1 M parameters, six fine-tunes of one base, features normalised",
    metric="test accuracy, mean of 6 tasks, percent; adapted on the unlabelled test inputs",
    checks=(
        Check(
            text="layer-wise over task arithmetic at 0.3",
            left="layer_wise",
            right="task_arithmetic_0.3",
            margin=3.0,
        ),
        Check(
            text="layer-wise over the best of five scales chosen with the test labels",
            left="layer_wise",
            right="task_arithmetic_best",
            margin=0.0,
        ),
        Check(
            text="layer-wise++ over layer-wise",
            left="layer_wise_plus_plus",
            right="layer_wise",
            margin=-1.0,
        ),
        Check(
            text="layer-wise over task-wise",
            left="layer_wise",
            right="task_wise",
            asserted=False,
        ),
        Check(
            text="adapted on training inputs instead, over the best of five scales",
            left="layer_wise_train_inputs",
            right="task_arithmetic_best",
            asserted=False,
        ),
        Check(
            text="two tasks left out of the adaptation: over task arithmetic at 0.3 on those two",
            left="unseen_tasks",
            right="unseen_tasks_0.3",
            asserted=False,
        ),
        Check(
            text="noisy inputs (sd 0.3) to adapt to and to test on: over task arithmetic at 0.3",
            left="noisy",
            right="noisy_0.3",
            asserted=False,
        ),
    ),
)


def accuracy(zoo: zoos.Zoo, state: Mapping[str, Any], tasks: Any = None) -> float:
    """Return the mean test accuracy over tasks, in percent."""
    names = list(tasks or zoo.tasks)
    return 100 * sum(zoo.score(state, task) for task in names) / len(names)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    zoo = zoos.build("vision6", seed, on_step=on_step)
    pool = Pool(zoo.base, zoo.experts)
    forward = ModuleForward(zoo.module(), zoo.heads)
    names = list(zoo.tasks)

    def at(scale: float) -> Mapping[str, Any]:
        return merge(pool, f"task_arithmetic(scale={scale})")

    def streams(split: str = "test", tasks: Any = None) -> dict[str, Any]:
        return {t: zoo.unlabelled(t, split, BATCH, seed) for t in tasks or names}  # type: ignore[arg-type]

    def tuned(inputs: Mapping[str, Any], **settings: Any) -> Mapping[str, Any]:
        heads = {task: zoo.heads[task] for task in inputs}
        own = ModuleForward(forward.module, heads)
        method = AdaMerging(steps=STEPS, lr=LR, **settings)
        return method.fit(pool, own, inputs, on_step=on_step).weights

    scales = {scale: accuracy(zoo, at(scale)) for scale in GRID}
    out = {
        "base": accuracy(zoo, zoo.base),
        "specialists": 100 * sum(zoo.expert_scores().values()) / len(names),
        **{f"task_arithmetic_{scale}": value for scale, value in scales.items()},
        "task_arithmetic_best": max(scales.values()),
        "layer_wise": accuracy(zoo, tuned(streams())),
        "task_wise": accuracy(zoo, tuned(streams(), by="model")),
        "layer_wise_plus_plus": accuracy(zoo, tuned(streams(), plus_plus=True)),
        "layer_wise_train_inputs": accuracy(zoo, tuned(streams("train"))),
    }
    seen, unseen = names[:-2], names[-2:]
    held = tuned(streams(tasks=seen))
    out["unseen_tasks"] = accuracy(zoo, held, unseen)
    out["unseen_tasks_0.3"] = accuracy(zoo, at(0.3), unseen)
    return out | noisy(zoo, tuned, at(0.3), seed)


def noisy(zoo: zoos.Zoo, tuned: Any, fixed: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Return the accuracy on test inputs with Gaussian noise, after adapting to such inputs."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    inputs, labels = {}, {}
    for task in zoo.tasks:
        x, labels[task] = zoo.tasks[task].split("test")
        inputs[task] = x + 0.3 * torch.randn(x.shape, generator=rng)
    state = tuned({task: list(x.split(BATCH)) for task, x in inputs.items()})

    def score(weights: Mapping[str, Any]) -> float:
        right = [
            float((zoo.logits(weights, t, x).argmax(1) == labels[t]).double().mean())
            for t, x in inputs.items()
        ]
        return 100 * sum(right) / len(right)

    return {"noisy": score(state), "noisy_0.3": score(fixed)}

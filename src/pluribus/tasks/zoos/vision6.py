"""The bed `vision6` of the adamerging page: six close tasks on 28x28, a small transformer.

Classes {0, 1, 5, 8, 9} of Fashion-MNIST under five fixed transforms, and scikit-learn's digits; a
base trained jointly on 400 images a task, and features of length 12. The page measured, on one
seed: base 89.3, own models 95.4, task arithmetic at 0.1 / 0.2 / 0.3 / 0.5: 89.8 / 89.0 / 86.4 /
78.3. Here, mean of seeds 0, 1, 2: base 87.9, own models 95.5, task arithmetic 88.5 / 87.7 / 85.8 /
76.8. The set fashion_mnist comes through $PLURIBUS_DATA; deviations are in `pluribus.tasks.views`.

The harder bed of the atlas page, on which a merge has further to go, is
`build(seed, **HARDER)`; its few-shot check builds with `without=TASK`, so that neither base nor
experts have seen the target, and gives it a head by `pluribus.tasks.heads.class_means`.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

from pluribus.core.errors import InputError, nearest
from pluribus.tasks import views
from pluribus.tasks.encoders.transformer import VisionTransformer
from pluribus.tasks.raising import raise_specialists
from pluribus.tasks.specialise import OnStep, Plan
from pluribus.tasks.views import Sizes
from pluribus.tasks.zoo import Zoo

PLAN = Plan(
    base_steps=220,
    base_batch=24,
    base_pool=400,
    base_lr=1e-3,
    base_schedule="cosine",
    steps=260,
    batch=64,
    lr=7e-4,
    weight_decay=0.01,
    warmup=0,
    smoothing=0.0,
    threads=1,  # two cost more than they bring at this width
)
SIZES = Sizes(train=3000, val=600, test=600)
SCALE = 12.0  # length of normalised features
HARDER = {"classes": "all", "normalise": False, "depth": 4, "base_steps": 150, "base_pool": 300}


def build(
    seed: int = 0,
    *,
    cache: bool = True,
    on_step: OnStep | None = None,
    train: int = SIZES.train,
    val: int = SIZES.val,
    test: int = SIZES.test,
    classes: Literal["few", "all"] = "few",
    normalise: bool = True,
    width: int = 64,
    depth: int = 3,
    base_steps: int = PLAN.base_steps,
    base_pool: int = PLAN.base_pool,
    steps: int = 260,
    without: str | None = None,
    threads: int = PLAN.threads,
) -> Zoo:
    """Build the zoo; every size defaults to the page's, `classes` to its five.

    Raises DataError without its data, InputError for a task to leave out that isn't there.
    """
    tasks = views.vision6(seed, Sizes(train, val, test), views.FEW if classes == "few" else None)
    if without is not None and without not in tasks:
        raise InputError(
            f"vision6 has no task '{without}' to leave out; there are: {', '.join(tasks)}."
            f"{nearest(without, tasks)}"
        )
    plan = replace(PLAN, base_steps=base_steps, base_pool=base_pool, steps=steps, threads=threads)
    model = partial(
        VisionTransformer,
        channels=1,
        side=28,
        patch=7,
        width=width,
        depth=depth,
        scale=SCALE if normalise else None,
    )
    return raise_specialists(
        "vision6", tasks, plan, seed, model, cache=cache, on_step=on_step, without=without
    )

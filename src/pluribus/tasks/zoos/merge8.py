"""The bed `merge8` of the tall-masks page: eight 28x28 tasks, a 3.56 M encoder, real images.

Ortiz-Jimenez et al.'s setting (task arithmetic over many fine-tuned copies of one base) at a size
where it trains in minutes on a core. Data: sets mnist and cifar10 (through $PLURIBUS_DATA) and the
embedded digits; tasks and deviations from the page are in `pluribus.tasks.views`.
"""

from dataclasses import replace
from functools import partial

from pluribus.tasks import views
from pluribus.tasks.encoders.mlp import ResidualMLP
from pluribus.tasks.raising import raise_specialists
from pluribus.tasks.specialise import OnStep, Plan
from pluribus.tasks.views import Sizes
from pluribus.tasks.zoo import Zoo

SIDE, WIDTH, DEPTH = 28, 512, 6
PLAN = Plan()  # its defaults are the page's
SIZES = Sizes(train=1500, val=500, test=500)


def build(
    seed: int = 0,
    *,
    cache: bool = True,
    on_step: OnStep | None = None,
    train: int = SIZES.train,
    val: int = SIZES.val,
    test: int = SIZES.test,
    width: int = WIDTH,
    depth: int = DEPTH,
    base_steps: int = PLAN.base_steps,
    epochs: int = PLAN.epochs,
    threads: int = PLAN.threads,
) -> Zoo:
    """Build the zoo; every size defaults to the page's. Raises DataError without its data."""
    tasks = views.merge8(seed, Sizes(train, val, test))
    plan = replace(PLAN, base_steps=base_steps, epochs=epochs, threads=threads)
    model = partial(ResidualMLP, SIDE * SIDE, width, depth)
    return raise_specialists("merge8", tasks, plan, seed, model, cache=cache, on_step=on_step)

"""A zoo that needs nothing but the package: eight views of scikit-learn's digits, 8x8.

The recipe of `merge8`, sized so that base and experts train in about half a minute on two cores.
"""

from dataclasses import replace
from functools import partial

from pluribus.tasks import views
from pluribus.tasks.encoders.mlp import ResidualMLP
from pluribus.tasks.raising import raise_specialists
from pluribus.tasks.specialise import OnStep, Plan
from pluribus.tasks.views import Sizes
from pluribus.tasks.zoo import Zoo

SIDE, WIDTH, DEPTH = 8, 256, 6
PLAN = Plan(epochs=10)
SIZES = Sizes(train=1077, val=360, test=360)


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
    """Build the zoo from the embedded digits."""
    tasks = views.demo8(seed, Sizes(train, val, test))
    plan = replace(PLAN, base_steps=base_steps, epochs=epochs, threads=threads)
    model = partial(ResidualMLP, SIDE * SIDE, width, depth)
    return raise_specialists("demo8", tasks, plan, seed, model, cache=cache, on_step=on_step)

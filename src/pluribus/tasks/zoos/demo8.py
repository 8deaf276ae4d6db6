"""A zoo that needs nothing but the package: eight views of scikit-learn's digits, 8x8.

The recipe of `merge8`, sized so that base and experts train in about half a minute on two cores.
"""

from dataclasses import replace

from pluribus.tasks import views
from pluribus.tasks.specialise import OnStep, Plan
from pluribus.tasks.views import Sizes
from pluribus.tasks.zoo import Zoo, raise_specialists

PLAN = Plan(width=256, depth=6, epochs=10)
SIZES = Sizes(train=1077, val=360, test=360)


def build(
    seed: int = 0,
    *,
    cache: bool = True,
    on_step: OnStep | None = None,
    train: int = SIZES.train,
    val: int = SIZES.val,
    test: int = SIZES.test,
    width: int = PLAN.width,
    depth: int = PLAN.depth,
    base_steps: int = PLAN.base_steps,
    epochs: int = PLAN.epochs,
    threads: int = PLAN.threads,
) -> Zoo:
    """Build the zoo from the embedded digits."""
    tasks = views.demo8(seed, Sizes(train, val, test))
    plan = replace(
        PLAN, width=width, depth=depth, base_steps=base_steps, epochs=epochs, threads=threads
    )
    return raise_specialists("demo8", tasks, plan, seed, cache=cache, on_step=on_step)

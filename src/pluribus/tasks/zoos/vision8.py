"""Eight real image sets, one small vision transformer (1.0 M parameters) trained from scratch.

The tasks are those of `pluribus.tasks.photos`, through $PLURIBUS_DATA. The base is trained jointly
on a part of each set, so that it is competent before it specialises, as pre-trained encoders are:
experts then differ from it by a fine-tuning, not by all they know. Features have length 12. Seed 0:
base 58.8 % (mean of 8 tasks), specialists 70.0 %, task arithmetic at 0.1 / 0.2 / 0.3: 60.3 / 59.6 /
56.8. CIFAR-10 (32 %), GTSRB (25 %) and Omniglot (59 %) stay hard for an encoder this small.
"""

from dataclasses import replace
from functools import partial

from pluribus.tasks import photos
from pluribus.tasks.encoders.transformer import VisionTransformer
from pluribus.tasks.raising import raise_specialists
from pluribus.tasks.specialise import OnStep, Plan
from pluribus.tasks.views import Sizes
from pluribus.tasks.zoo import Zoo

PLAN = Plan(
    base_steps=300,
    base_batch=24,
    base_pool=800,
    base_lr=1e-3,
    base_schedule="cosine",
    steps=150,
    batch=64,
    lr=5e-4,
    weight_decay=0.01,
    warmup=10,
    smoothing=0.0,
)
SIZES = Sizes(train=3000, val=400, test=600)
SCALE = 12.0  # length of the features


def build(
    seed: int = 0,
    *,
    cache: bool = True,
    on_step: OnStep | None = None,
    train: int = SIZES.train,
    val: int = SIZES.val,
    test: int = SIZES.test,
    width: int = 160,
    depth: int = 4,
    base_steps: int = PLAN.base_steps,
    base_pool: int = PLAN.base_pool,
    base_lr: float = PLAN.base_lr,
    steps: int = 150,
    lr: float = PLAN.lr,
    threads: int = PLAN.threads,
) -> Zoo:
    """Build the zoo. Raises DataError without its data."""
    tasks = photos.vision8(seed, Sizes(train, val, test))
    plan = replace(
        PLAN,
        base_steps=base_steps,
        base_pool=base_pool,
        base_lr=base_lr,
        steps=steps,
        lr=lr,
        threads=threads,
    )
    model = partial(
        VisionTransformer,
        channels=3,
        side=photos.SIDE,
        patch=8,
        width=width,
        depth=depth,
        stem="convolutions",
        scale=SCALE,
    )
    return raise_specialists("vision8", tasks, plan, seed, model, cache=cache, on_step=on_step)

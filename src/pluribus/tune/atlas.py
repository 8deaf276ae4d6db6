"""aTLAS: learn one coefficient for each block of each task vector, from few labels or none.

Zhang et al., NeurIPS 2024, https://arxiv.org/abs/2407.02880, sections 3 to 5.

    theta_j = theta0_j + sum_t c[j, t, g] tau_tj     j a tensor, g a group of its coordinates
    c      <- AdamW from 0 on  sum over tasks of the objective; gradient norm at most `clip`

At the start the model is the base. Nothing is clamped; weight decay lets unused coefficients
shrink. `scope`: one coefficient for each block, one for each task vector ("vector", the isotropic
baseline), or K for each block ("partition": its coordinates are dealt at random into `partitions`
groups, of which only `seed` is kept). What it is for depends on tasks, pool and objective:

    addition    cross_entropy on every expert's task             Atlas.addition()
    few-shot    cross_entropy on a new task; others' experts     Atlas.few_shot()
    negation    Negate: forget a task, hold a control            Atlas.negation("cars")
    test time   Ufm: guesses on the inputs themselves, no label  Atlas.test_time()

those being the authors' settings, but for the few-shot learning rate. Theirs is 0.1, which suits
coefficients that start at 0 and task vectors a hundred times shorter than the weights; "auto" is
0.1 (median |theta0_j| / |tau_tj|) / 100, held within [0.001, 0.1] (ours). The coefficients kept are
those of the epoch with the best validation score, the base's included (see `_judge`); so the result
is never worse than the base on what it was chosen on. `penalty` p adds half the mean over blocks of
|c[j]|_p. `budget` b keeps b blocks at each position, by gradient or at random (see `_budget`);
`linear` learns for the network's first-order view (see `_linear`). `Tip` and `LpPlusPlus` are
adapters to train on top.

Differs from the authors' code: a partition moves tensors of every rank, and each has its own; their
defects in trusting, sharpening and adapters are not kept (see `_trusted`, `loss.ufm`, `_adapters`);
task vectors are float32 unless `task_vector_dtype` says otherwise.

Cost a step: one forward and backward pass for each task (for Ufm another forward), two reads of
the task vectors; memory: one model with its gradient, and the task vectors, b / t of them with a
budget. When it pays: a pool whose experts are relevant, and too few examples for fine-tuning. It
goes wrong with a pool that is not, and it cannot make features that no expert has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pluribus.core.errors import InputError
from pluribus.core.merger import NonNegative, Positive, PositiveInt
from pluribus.core.pool import Pool
from pluribus.loss import loss_of
from pluribus.tune._tuner import tuner

if TYPE_CHECKING:
    from torch import Tensor

    from pluribus.tune._examples import Augment
    from pluribus.tune._fit import OnStep
    from pluribus.tune._model import Forward
    from pluribus.tune._result import Tuned
    from pluribus.tune._trusted import View

NEGATION = {  # the authors' multiple of lr 1e-3, and epochs, by data set
    "cars": (5, 20),
    "dtd": (10, 20),
    "eurosat": (5, 3),
    "gtsrb": (5, 5),
    "mnist": (3, 7),
    "resisc45": (2, 10),
    "sun397": (3, 10),
    "svhn": (5, 2),
}


@tuner("atlas", paper="arXiv:2407.02880")
@dataclass(frozen=True, kw_only=True)
class Atlas:
    """Coefficients for blocks of task vectors, from few examples."""

    scope: Literal["block", "vector", "partition"] = "block"
    partitions: PositiveInt = 1  # groups of coordinates of a block, if scope is "partition"
    budget: PositiveInt | None = None  # blocks kept at each position; None: all
    budget_by: Literal["gradient", "random"] = "gradient"
    linear: bool = False
    lr: Literal["auto"] | Positive = "auto"
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: to 0, without a warm-up
    weight_decay: NonNegative = 0.1
    clip: Positive = 1.0  # the gradient's norm, at most
    penalty: Literal[0, 1, 2] = 0
    epochs: PositiveInt = 20
    steps_per_epoch: PositiveInt | None = None  # None: the shortest stream's batches
    batch_size: PositiveInt = 128  # of all tasks together, where whole sets are given
    fewest_batches: int = 0  # see `Examples`: sets of fewer batches are repeated
    keep: Literal["best", "last"] = "best"
    allow_own: bool = False  # a new task's own expert in the pool
    task_vector_dtype: Literal["float16", "bfloat16"] | None = None
    resident: bool = True  # keep the task vectors in memory
    exclude: tuple[str, ...] = ()  # tensors that stay the base's
    seed: int = 0

    @classmethod
    def addition(cls, **changes: Any) -> "Atlas":
        """Return the authors' settings for learning all experts' tasks at once."""
        return cls(**{"lr": 1e-3, "epochs": 20, **changes})

    @classmethod
    def few_shot(cls, **changes: Any) -> "Atlas":
        """Return the authors' settings for a new task, but for their lr of 0.1."""
        told = {"schedule": "cosine", "epochs": 10, "fewest_batches": 10}
        return cls(**{**told, **changes})

    @classmethod
    def negation(cls, data_set: str, **changes: Any) -> "Atlas":
        """Return the authors' settings for forgetting one of their eight data sets."""
        if data_set not in NEGATION:
            raise InputError(
                f"the authors negate {', '.join(NEGATION)}, not {data_set!r}; give lr and epochs"
            )
        times, epochs = NEGATION[data_set]
        return cls(**{"lr": times * 1e-3, "epochs": epochs, **changes})

    @classmethod
    def test_time(cls, **changes: Any) -> "Atlas":
        """Return the authors' settings for learning from unlabelled inputs."""
        return cls(**{"lr": 1e-3, "schedule": "cosine", "epochs": 10, **changes})

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""
        if self.partitions > 1 and self.scope != "partition":
            raise InputError(
                f"atlas: partitions = {self.partitions} with scope = {self.scope!r}: give "
                "scope='partition' too"
            )
        if self.budget is not None and self.scope == "vector":
            raise InputError(
                "atlas: a budget chooses blocks tensor by tensor, and scope='vector' has one "
                "coefficient for all of them; give scope='block'"
            )
        if self.fewest_batches < 0:
            raise InputError(f"atlas: fewest_batches = {self.fewest_batches}: give 0 or more")

    def fit(
        self,
        pool: Pool,
        forward: "Forward",
        streams: Mapping[str, Any],
        *,
        objective: str | Callable[..., Any] = "cross_entropy",
        validation: Mapping[str, Any] | None = None,
        select: "Callable[[Mapping[str, Tensor]], float] | None" = None,
        views: "tuple[View, View] | None" = None,
        augment: "Augment | None" = None,
        device: str = "cpu",
        on_step: "OnStep | None" = None,
    ) -> "Tuned":
        """Learn the coefficients of a pool.

        `streams` gives each task's examples: whole, as (inputs, labels), or as the inputs alone for
        an objective that needs no labels, and then dealt in batches of batch_size / tasks; or as
        `Examples`; or as batches, such as a DataLoader. `validation` gives labelled sets by task to
        choose the epoch by; without it those learned from serve, as in the authors' addition. A few
        shots are poor judges: give some. `select(parameters)` judges instead, greater being better.
        `views` are Ufm's weak and strong one, `augment` changes inputs of whole sets as they are
        dealt; all are functions of (inputs, generator). Raises InputError, MismatchError or
        NonFiniteError.
        """
        from pluribus.tune import _atlas

        return _atlas.fit(
            self,
            pool,
            forward,
            streams,
            objective=objective,
            loss=loss_of(objective),
            validation=validation,
            select=select,
            views=views,
            augment=augment,
            device=device,
            on_step=on_step,
        )

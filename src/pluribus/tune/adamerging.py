"""AdaMerging: learn how much of each task vector to add, by making the merged model sure of itself.

Yang et al., ICLR 2024, https://arxiv.org/abs/2310.02575, sections 3.2 and 3.3.

    theta_j = theta0_j + sum_t clamp(c[j, t], 0, 1) tau_tj        j a tensor, a layer or the model
    c      <- Adam on  sum_t mean entropy of softmax(head_t(f(x_t; theta)))   over unlabelled x_t

`plus_plus` sends the task vectors through TIES first: trimmed to the top 20 % of the whole model
(ties included), with the elected sign, and kept apart. What comes out are the coefficients; the
last step's, as there are no labels to choose another by (`stop="agreement"`, ours, keeps the step
at which the merged model named most probe inputs as their experts do).

Settings are the paper's with one batch of 16 a task and step; `official()` takes two, as the
authors' loop does. FusionBench draws one, takes 1000 steps and doesn't clamp. Differs from the
authors: the model is in evaluation mode; tensors go by name, not by position; buffers keep the
base's values. A coefficient outside the clamp gets no gradient and comes back only by momentum, as
published.

Cost a step: one forward and backward pass for each task and batch, two reads of the task vectors;
memory: one model with its gradient, and the task vectors if they are resident. When it pays: many
experts, few unlabelled inputs, a competent base and calibrated heads. It goes wrong with a weak
base or logits that the merge can inflate: look at the warnings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pluribus.core.errors import InputError
from pluribus.core.merger import NonNegative, Positive, PositiveInt
from pluribus.core.pool import Pool
from pluribus.loss import loss_of
from pluribus.loss.entropy import Entropy
from pluribus.tune._tuner import look_at, tuner

if TYPE_CHECKING:
    from pluribus.tune._blend import Leaves
    from pluribus.tune._fit import OnStep
    from pluribus.tune._model import Forward
    from pluribus.tune._result import Tuned
    from pluribus.tune._streams import Batch

PLUS_PLUS = "trim(density=0.2, scope='model', count='official') >> elect(tie='global')"


@tuner("adamerging", paper="arXiv:2310.02575")
@dataclass(frozen=True, kw_only=True)
class AdaMerging:
    """Coefficients from unlabelled inputs."""

    by: Literal["tensor", "layer", "model"] = "tensor"  # "model" is the paper's task-wise form
    plus_plus: bool = False
    init: float = 0.3
    clamp: tuple[float, float] | None = (0.0, 1.0)
    steps: PositiveInt = 500
    lr: Positive = 1e-3
    batches_per_step: PositiveInt = 1
    diversity: NonNegative = 0.0  # see pluribus.loss.entropy
    stop: Literal["last", "agreement"] = "last"
    resident: bool = True  # keep the task vectors in memory
    exclude: tuple[str, ...] = ()  # tensors that stay the base's

    @classmethod
    def official(cls, **changes: Any) -> "AdaMerging":
        """Return the settings of the authors' loop: two batches of 16 a task and step."""
        return cls(**{"batches_per_step": 2, **changes})

    def check(self) -> None:
        """Raise InputError for a clamp whose ends are in the wrong order."""
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise InputError(f"adamerging: clamp = {self.clamp}: give (low, high)")

    def fit(
        self,
        pool: Pool,
        forward: "Forward",
        streams: Mapping[str, Iterable[Any]],
        *,
        objective: str | Callable[..., Any] = "entropy",
        device: str = "cpu",
        on_step: "OnStep | None" = None,
    ) -> "Tuned":
        """Learn the coefficients of a pool.

        `streams` gives each task's batches: inputs alone, or (inputs, labels) for an objective
        that needs labels ("cross_entropy": the supervised variant). `forward(parameters, inputs,
        task)` returns class scores (b, v). Raises InputError, MismatchError or NonFiniteError.
        """
        import torch

        from pluribus.tune._blend import Blend
        from pluribus.tune._fit import Log, Problem, descend
        from pluribus.tune._result import Tuned
        from pluribus.tune._streams import check_tasks

        log = Log()
        buffers = look_at(pool, forward, log)
        heads = getattr(forward, "heads", None)
        if heads:
            check_tasks(streams, heads, "head")
        loss = loss_of(objective)
        if objective == "entropy" and self.diversity:
            loss = Entropy(diversity=self.diversity)
        blend = Blend(
            pool,
            by=self.by,
            init=self.init,
            clamp=self.clamp,
            of=PLUS_PLUS if self.plus_plus else "",
            exclude=(*buffers, *(n for n in self.exclude if n not in buffers)),
            resident=self.resident,
            device=device,
        )
        problem = Problem(blend, forward, streams, loss)

        def gradient(leaves: "Leaves", batches: "Sequence[Batch]") -> None:
            blend.pull(leaves)

        descend(
            problem,
            [blend.coefficients],
            torch.optim.Adam([blend.coefficients], lr=self.lr),
            self.steps,
            gradient,
            log=log,
            batches_per_step=self.batches_per_step,
            probe_every=max(10, self.steps // 20),
            stop=self.stop,
            on_step=on_step,
        )
        note = {"method": "adamerging", "by": self.by, "plus_plus": str(self.plus_plus)}
        return Tuned(pool, blend.export(note=note), self, blend.of, log)

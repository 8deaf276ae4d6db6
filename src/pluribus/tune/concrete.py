"""Concrete: learn one mask for all task vectors that removes the weights where tasks interfere.

Tang et al., Concrete Subspace Learning, https://arxiv.org/abs/2312.06173, sections 3.2 to 3.4.

    theta_j = theta0_j + m_j * sum_t c[j, t] tau_tj     m_j a drawn mask, the same for all experts
    x      <- Adam on  sum_t entropy at theta           x the mask's logits, see `ConcreteMask`

`inner="none"` is Concrete Task Arithmetic: c = `scale` throughout. With "model" or "tensor" it is
Concrete AdaMerging, one coefficient an expert or one for each tensor, in two stages. The first
learns the mask; each step draws one, and

    c  = scale;  c' = c after one Adam step on the entropy of a batch, whose moments live on
    x  gets the gradient at (c', m) on fresh batches, c' counting as a constant (first order)

The second keeps one mask and learns c as plain AdaMerging does. `final_mask`: "expected" (ours) is
sigmoid(x), rescaled, and draws nothing; "continuous" (the authors', who draw again for each
evaluation) and "discrete" are one draw that `seed` decides. `variant` gives all three.

`official()` draws anew after the inner step and keeps a continuous mask, as the authors do;
FusionBench reuses the draw, as we do, takes 1000 steps, and does not clamp. Both take the inner
gradient where the last step's coefficients had merged; here the coefficients are reset, then
merged, then differentiated, as the paper says. The inner lr is the authors': on the zoo vision6
(seed 0; 100 steps at lr 3e-3, then 60 at 2e-3) 1.0 / 0.1 / 0.03 ended at 85.0 / 83.9 / 84.3 % of
the test inputs named right with a coefficient a tensor, 86.4 / 86.4 / 85.7 with one an expert,
where task arithmetic has 84.3; 0.6 is the standard error.

Cost: steps x tasks passes forward and backward, twice that with an inner problem, then adapt_steps
x tasks; memory: the model, its gradient, and four numbers a weight for logits, moments and draw.
When it pays: static merging loses much to interference, the base is competent, and there is time
for thousands of passes. It goes wrong as AdaMerging does, and sooner, having as many logits as the
model has weights: entropy falls and the weakest tasks lose. `diversity` = 1 (ours) mends that on
vision6, see `pluribus claims concrete`. Coefficients learned long on a fixed mask can lose again:
look at `stop`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from pluribus.core.coefficients import Coefficients
from pluribus.core.errors import InputError, listing, nearest
from pluribus.core.merger import NonNegative, Positive, PositiveInt
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.loss import loss_of
from pluribus.loss.entropy import Entropy
from pluribus.tune._tuner import look_at, tuner

if TYPE_CHECKING:
    from pluribus.tune._blend import Leaves
    from pluribus.tune._fit import OnStep
    from pluribus.tune._mask import ConcreteMask
    from pluribus.tune._model import Forward
    from pluribus.tune._result import Tuned
    from pluribus.tune._streams import Batch

Final = Literal["expected", "continuous", "discrete"]
FINALS: tuple[Final, ...] = ("expected", "continuous", "discrete")


@tuner("concrete", paper="arXiv:2312.06173")
@dataclass(frozen=True, kw_only=True)
class Concrete:
    """A shared mask, and coefficients, from unlabelled inputs."""

    inner: Literal["none", "model", "tensor"] = "none"  # what has a coefficient of its own
    steps: Annotated[int, Ge(0)] = 2000  # of the mask; 0 takes the logits as they are given
    lr: Positive = 1e-3
    inner_lr: Positive = 1.0
    adapt_steps: PositiveInt = 1000  # of the coefficients, on the fixed mask
    adapt_lr: Positive = 1e-3
    scale: float = 0.3
    clamp: tuple[float, float] | None = (0.0, 1.0)  # of learned coefficients
    final_mask: Final = "expected"
    redraw: bool = False  # draw again between inner and outer step
    temperature: Positive = 0.5
    min_numel: PositiveInt = 1  # smaller tensors have no mask
    batches_per_step: PositiveInt = 1
    diversity: NonNegative = 0.0  # see pluribus.loss.entropy
    stop: Literal["last", "agreement", "held_out"] = "last"
    held_out: PositiveInt = 2  # batches of each task that `stop="held_out"` judges by
    patience: PositiveInt = 5  # probes without a better one, of about 20 a stage; not for "last"
    seed: int = 0
    resident: bool = True  # keep the task vectors in memory
    exclude: tuple[str, ...] = ()  # tensors that stay the base's

    @classmethod
    def official(cls, **changes: Any) -> "Concrete":
        """Return the settings of the authors' loop."""
        given = {"inner_lr": 1.0, "redraw": True, "final_mask": "continuous"}
        return cls(**{**given, **changes})

    def check(self) -> None:
        """Raise InputError for a clamp that no coefficient can leave its start in."""
        if self.clamp is None:
            return
        low, high = self.clamp
        if not low < high:
            raise InputError(f"concrete: clamp = {self.clamp}: give (low, high)")
        if self.inner != "none" and not low <= self.scale <= high:
            raise InputError(
                f"concrete: scale = {self.scale} lies outside clamp = {self.clamp}, where "
                "coefficients get no gradient; widen the clamp"
            )

    def passes(self, tasks: int) -> int:
        """Return how many passes forward and backward a run takes, before any early end."""
        twice = 1 if self.inner == "none" else 2
        adapt = 0 if self.inner == "none" else self.adapt_steps
        return (self.steps * twice + adapt) * tasks * self.batches_per_step

    def fit(
        self,
        pool: Pool,
        forward: "Forward",
        streams: Mapping[str, Iterable[Any]],
        *,
        objective: str | Callable[..., Any] = "entropy",
        logits: Mapping[str, Any] | None = None,
        device: str = "cpu",
        on_step: "OnStep | None" = None,
    ) -> "Tuned":
        """Learn the mask, and the coefficients, of a pool.

        See `AdaMerging.fit` for `streams`, `forward` and `objective`. `logits` are those to start
        from, by name, such as another result's `mask.logits`. `stop="held_out"` keeps each stream's
        first batches for judging: of one that is shuffled anew they come again later. The result's
        `mask` has the logits. Raises InputError, MismatchError or NonFiniteError.
        """
        import torch

        from pluribus.tune._blend import Blend
        from pluribus.tune._concrete import Estimate, MaskStage, judge_of, note_stage
        from pluribus.tune._fit import Log, Problem, descend
        from pluribus.tune._mask import ConcreteMask
        from pluribus.tune._result import Tuned
        from pluribus.tune._streams import check_tasks, hold_out

        log = Log()
        buffers = look_at(pool, forward, log)
        heads = getattr(forward, "heads", None)
        if heads:
            check_tasks(streams, heads, "head")
        kept: dict[str, list[Any]] = {}
        if self.stop == "held_out":
            kept, streams = hold_out(streams, self.held_out)
        blend = Blend(
            pool,
            by="tensor" if self.inner == "tensor" else "model",
            init=self.scale,
            clamp=None if self.inner == "none" else self.clamp,
            exclude=(*buffers, *(n for n in self.exclude if n not in buffers)),
            resident=self.resident,
            device=device,
        )
        shapes = {name: blend.base.source(name).spec.shape for name in blend.tensors}
        start = 0.0 if logits is None else logits
        mask = ConcreteMask(shapes, self.temperature, start, self.min_numel, device=device)
        if mask.left_out:
            log.notes.append(
                f"{len(mask.left_out)} tensors have no mask ({listing(mask.left_out)}): of one "
                "entry, whose rescaled mask is always 1, or of fewer than min_numel"
            )
        loss = loss_of(objective)
        if objective == "entropy" and self.diversity:
            loss = Entropy(diversity=self.diversity)
        problem = Problem(blend, forward, streams, loss)
        judge = None if self.stop != "held_out" else judge_of(problem, kept)
        rest: dict[str, Any] = {
            "log": log,
            "stop": self.stop,
            "judge": judge,
            "patience": 0 if self.stop == "last" else self.patience,
        }
        tasks = len(problem.streams.tasks)
        estimate = Estimate(self.passes(tasks), self.steps, log, on_step)
        stage = MaskStage(self, problem, mask)
        if self.steps:
            estimate.announce("mask", self.steps)
            descend(
                problem,
                [mask.flat],
                torch.optim.Adam([mask.flat], lr=self.lr),
                self.steps,
                stage.gradient,
                masks=stage.masks,
                settled=mask.expected,
                inner=None if self.inner == "none" else stage.inner,
                batches_per_step=self.batches_per_step * (1 if self.inner == "none" else 2),
                probe_every=max(10, self.steps // 20),
                stage="mask",
                on_step=estimate,
                **rest,
            )
            note_stage(log, "mask", 0)
        fixed = mask.final(self.final_mask, self.seed)

        def gradient(leaves: "Leaves", _: "Sequence[Batch]") -> None:
            blend.pull(leaves, fixed)

        if self.inner != "none":
            began = len(log.steps)
            estimate.announce("coefficients", self.adapt_steps)
            descend(
                problem,
                [blend.coefficients],
                torch.optim.Adam([blend.coefficients], lr=self.adapt_lr),
                self.adapt_steps,
                gradient,
                masks=lambda: fixed,
                batches_per_step=self.batches_per_step,
                probe_every=max(10, self.adapt_steps // 20),
                stage="coefficients",
                on_step=estimate,
                **rest,
            )
            note_stage(log, "coefficients", began)
        stage.compare(log)
        note = {"method": "concrete", "inner": self.inner, "final_mask": self.final_mask}
        return Tuned(pool, blend.export(fixed, note), self, blend.of, log, mask)


def variant(tuned: "Tuned", final_mask: Final, seed: int | None = None) -> "Tuned":
    """Return a result with another final mask: same logits, same coefficients.

    Those coefficients were learned on the mask of `tuned.method.final_mask`. `seed` decides a draw;
    by default that of the method. Raises InputError for a result without a mask.
    """
    masks = _mask(tuned).final(final_mask, tuned.method.seed if seed is None else seed)
    note = {**tuned.coefficients.note, "final_mask": final_mask}
    return replace(tuned, coefficients=_with(tuned, masks, tuned.coefficients.scales, note))


def own(tuned: "Tuned", expert: str, scale: float = 1.0) -> "Tuned":
    """Return one expert's own masked model: base + scale * m * tau_expert.

    The mask is the result's. Raises InputError for an unknown expert or a result without a mask.
    """
    names = tuned.coefficients.experts
    if expert not in names:
        raise InputError(
            f"no expert is called {expert!r}; there are: {', '.join(names)}."
            f"{nearest(expert, names)}"
        )
    one = np.array([scale * (name == expert) for name in names], np.float32)
    blended = _mask(tuned).shapes
    scales = {n: one if n in blended else old for n, old in tuned.coefficients.scales.items()}
    masks = tuned.coefficients.masks
    assert masks is not None
    note = {**tuned.coefficients.note, "own": expert}
    return replace(tuned, coefficients=_with(tuned, masks, scales, note))


def _mask(tuned: "Tuned") -> "ConcreteMask":
    if tuned.mask is None:
        raise InputError(f"{type(tuned.method).__name__} learned no mask; tune with Concrete")
    return tuned.mask


def _with(
    tuned: "Tuned",
    masks: Mapping[str, Any],
    scales: Mapping[str, np.ndarray],
    note: Mapping[str, str],
) -> Coefficients:
    held = masks if isinstance(masks, Weights) else Weights.of(masks, label="masks")
    return replace(tuned.coefficients, scales=scales, masks=held, note=note)

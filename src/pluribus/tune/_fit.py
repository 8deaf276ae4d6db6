"""The loop that adamerging, atlas and concrete share.

    repeat: merge into leaves; for every task and batch, loss.backward(); pull; optimiser step

plus what a user should know while it runs: the loss of each task, whether the merged model still
agrees with each task's own expert, coefficients that run away, and what happens at the first number
that is not finite: it stops and keeps what it had.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pluribus.core.errors import InputError, NonFiniteError, listing
from pluribus.loss import logits_of, needs
from pluribus.loss.cross_entropy import CrossEntropy
from pluribus.loss.negate import Negate
from pluribus.tune._blend import Blend, Leaves
from pluribus.tune._model import Forward, held
from pluribus.tune._streams import Batch, Ended, Streams
from pluribus.tune._trusted import Guesser, weak_of

RUNAWAY = 10.0  # a coefficient this large has left the region where a first-order view holds
FALL = 0.02  # of agreement, while the loss falls: what the diagnosis warns about
PROBE = 64  # inputs a task, at most, for the diagnosis


class Step(NamedTuple):
    """What one step of tuning saw."""

    number: int
    loss: float
    by_task: dict[str, float]
    agreement: float | None = None  # share of probe inputs named as the task's own expert does
    judged: float | None = None  # what `stop` compares, if it is not the agreement


OnStep = Callable[[str, int, int], None]


@dataclass
class Log:
    """History and warnings of one run."""

    steps: list[Step] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is worth knowing, and not odd
    stopped: str = ""  # why, if before the last step
    best: int | None = None  # the step that was kept, if not the last
    skipped: int = 0  # steps that had nothing to learn from

    def warn(self, text: str) -> None:
        """Note something odd, once."""
        if text not in self.warnings:
            self.warnings.append(text)


class Problem:
    """A model, its tasks' inputs and an objective: what a set of coefficients is judged by."""

    def __init__(
        self,
        blend: Blend,
        forward: Forward,
        streams: Mapping[str, Any],
        objective: Callable[..., Any],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if isinstance(objective, Negate):  # each task's cross-entropy, with a sign
            weights, objective = objective.shares(streams), CrossEntropy()
        self.blend, self.forward, self.objective = blend, forward, objective
        self.wants = needs(objective)
        self._guesser = Guesser(objective) if self.wants == "guesses" else None
        self.streams = Streams(streams, labelled=self.wants == "labels", device=blend.device)
        self.share = {task: (weights or {}).get(task, 1.0) for task in self.streams.tasks}
        self._teachers: dict[str, dict[str, Tensor]] = {}
        if self.wants == "experts":
            absent = [task for task in self.streams.tasks if task not in blend.experts]
            if absent:
                raise InputError(
                    f"the objective compares with each task's expert, but {listing(absent)} has "
                    f"none of its name; experts: {', '.join(blend.experts)}"
                )

    def batches(self, count: int) -> list[Batch]:
        """Draw `count` batches of every task. Raises Ended if a stream has no more."""
        return [self.streams.next(task) for _ in range(count) for task in self.streams.tasks]

    def backward(self, leaves: Leaves, batches: Sequence[Batch]) -> dict[str, float]:
        """Let the leaves collect the gradient of the summed losses; return them by task."""
        parameters = self.blend.parameters(leaves)
        out: dict[str, float] = {}
        targets = [self._targets(batch) for batch in batches]
        with held(self.forward, parameters), torch.enable_grad():
            for batch, wanted in zip(batches, targets, strict=True):
                inputs = batch.inputs
                if self._guesser is not None:
                    inputs, wanted = self._guesser(self.forward, parameters, batch)
                outputs = self.forward(parameters, inputs, batch.task)
                loss = self.objective(outputs, wanted) * self.share[batch.task]
                if loss.requires_grad:
                    loss.backward()
                out[batch.task] = out.get(batch.task, 0.0) + float(loss.detach())
        return out

    def losses(self, leaves: Leaves, batches: Sequence[Batch]) -> dict[str, float]:
        """Return the summed losses by task, without a gradient."""
        parameters = self.blend.parameters(leaves)
        out: dict[str, float] = {}
        targets = [self._targets(batch) for batch in batches]
        with held(self.forward, parameters), torch.no_grad():
            for batch, wanted in zip(batches, targets, strict=True):
                outputs = self.forward(parameters, batch.inputs, batch.task)
                loss = float(self.objective(outputs, wanted)) * self.share[batch.task]
                out[batch.task] = out.get(batch.task, 0.0) + loss
        return out

    def _targets(self, batch: Batch) -> Any:
        if self.wants == "labels":
            return batch.labels
        if self.wants == "experts":
            return self.expert_outputs(batch.inputs, batch.task)
        return None

    def expert_outputs(self, inputs: Any, task: str) -> Tensor:
        """Return what the task's own expert makes of the inputs, without a gradient."""
        if task not in self._teachers:
            expert = self.blend.pool.experts[task]
            self._teachers = {}  # one at a time in memory
            found = {name: expert[name].to(self.blend.device) for name in self.blend.pool.names}
            kept = {n: t.float() if t.is_floating_point() else t for n, t in found.items()}
            aliases = self.blend.pool.aliases
            self._teachers[task] = kept | {name: kept[to] for name, to in aliases.items()}
        with torch.no_grad():
            plain = getattr(self.forward, "plain", self.forward)  # a linearised model's own
            return logits_of(plain(self._teachers[task], inputs, task))


class Probe:
    """The same few inputs all along, and what each task's expert calls them: needs no label."""

    def __init__(self, problem: Problem, batches: Sequence[Batch]) -> None:
        self.problem = problem
        self.batches: list[tuple[Batch, Tensor]] = []
        for batch in batches:
            if batch.task in problem.blend.experts:
                try:
                    named = problem.expert_outputs(batch.inputs, batch.task).argmax(1)
                except InputError:  # outputs that are no class scores cannot be compared
                    continue
                self.batches.append((batch, named))

    def agreement(self, leaves: Leaves) -> float | None:
        """Return the mean over tasks of the share of inputs on which model and expert agree."""
        if not self.batches:
            return None
        parameters = self.problem.blend.parameters(leaves)
        shares = []
        with held(self.problem.forward, parameters), torch.no_grad():
            for batch, named in self.batches:
                outputs = logits_of(self.problem.forward(parameters, batch.inputs, batch.task))
                shares.append(float((outputs.argmax(1) == named).double().mean()))
        return sum(shares) / len(shares)

    def classes(self, leaves: Leaves) -> dict[str, list[int]]:
        """Return how often each class is named, by task: a collapse shows here."""
        parameters = self.problem.blend.parameters(leaves)
        out = {}
        with held(self.problem.forward, parameters), torch.no_grad():
            for batch, _ in self.batches:
                outputs = logits_of(self.problem.forward(parameters, batch.inputs, batch.task))
                counts = outputs.argmax(1).bincount(minlength=outputs.shape[1])
                out[batch.task] = counts.tolist()
        return out


def blame(blend: Blend, leaves: Leaves, terms: Mapping[str, float], number: int) -> NonFiniteError:
    """Return the error for a loss or gradient that is not finite, naming where it shows."""
    broken = [task for task, value in terms.items() if not _finite(value)]
    weights = [name for name, leaf in leaves.items() if not bool(leaf.detach().isfinite().all())]
    slopes = [
        name
        for name, leaf in leaves.items()
        if leaf.grad is not None and not bool(leaf.grad.isfinite().all())
    ]
    if weights:
        for label, model in {"base": blend.pool.base, **blend.pool.experts}.items():
            if model is not None and not bool(model[weights[0]].isfinite().all()):
                return NonFiniteError(
                    f"{label}: tensor {weights[0]!r} holds NaN or infinite values; repair that "
                    "model, or leave it out"
                )
        where = f"the merged tensor {weights[0]!r} is not finite"
    elif slopes:
        where = f"the gradient of {slopes[0]!r} is the first that is not finite"
    else:
        where = "all merged tensors and gradients are finite, so the model's own arithmetic is not"
    which = f"the loss of task {listing(broken)}" if broken else "a gradient"
    return NonFiniteError(
        f"step {number}: {which} is not finite; {where}. Try a smaller lr, or look at the inputs"
    )


def _finite(value: float) -> bool:
    return value == value and value not in (float("inf"), float("-inf"))


def descend(
    problem: Problem,
    parameters: Sequence[Tensor],
    optimiser: torch.optim.Optimizer,
    steps: int,
    gradient: Callable[[Leaves, Sequence[Batch]], bool | None],
    *,
    log: Log,
    masks: Callable[[], Mapping[str, Tensor] | None] = lambda: None,
    settled: Callable[[], Mapping[str, Tensor] | None] | None = None,
    inner: Callable[[Leaves, Sequence[Batch]], Sequence[Batch]] | None = None,
    judge: Callable[[Leaves], float | None] | None = None,
    patience: int = 0,
    batches_per_step: int = 1,
    probe_every: int = 0,
    stop: str = "last",
    stage: str = "tuning",
    on_step: OnStep | None = None,
    schedule: Callable[[int], float] | None = None,
    only: str = "merged",
) -> None:
    """Run the loop; `parameters` are what the optimiser changes, and are left at what was kept.

    `gradient(leaves, batches)` turns the leaves' gradients into the parameters'; False leaves the
    step out. `schedule(step)` scales the learning rate. `stop="agreement"` keeps the step that
    agreed best with the experts; with `judge(leaves)`, any `stop` but "last" keeps the step of
    which that is greatest, and ends the loop after `patience` probes without a greater one, or when
    it says None. `masks()` is asked for each step's masks; probes look at the model with the
    `settled()` ones. `inner(leaves, batches)` uses up some of the batches and may merge anew; it
    returns the rest. Raises InputError or NonFiniteError if nothing was learned before a stream
    ended or a number was not finite.
    """
    blend = problem.blend
    current = masks()
    leaves = blend.leaves(current, only=only)
    probe: Probe | None = None
    rates = [group["lr"] for group in optimiser.param_groups]
    best: tuple[float, int, list[Tensor]] | None = None
    began, done = len(log.steps), 0
    before = [p.detach().clone() for p in parameters]  # what gave the last finite loss
    for number in range(1, steps + 1):
        try:
            batches = problem.batches(batches_per_step)
        except Ended as end:
            if not log.steps:
                raise InputError(f"the stream of task {end} has no batch left") from None
            log.stopped = f"the stream of task {end} ended after {number - 1} of {steps} steps"
            log.warn(log.stopped)
            break
        if number > 1:
            current = masks()
            blend.refresh(leaves, current, only=only)
        agreement = judged = None
        if probe_every:
            if probe is None:
                seen = map(weak_of, batches) if problem.wants == "guesses" else batches
                first = {batch.task: _head(batch) for batch in reversed([*seen])}
                learnt = [t for t in problem.streams.tasks if problem.share[t] > 0]
                probe = Probe(problem, [first[task] for task in learnt])
            if (number - 1) % probe_every == 0:
                if settled is not None:
                    blend.refresh(leaves, settled(), only=only)
                agreement = probe.agreement(leaves)
                judged = None if judge is None else judge(leaves)
                if judge is not None and judged is None:
                    break
                best = _better(best, agreement if judge is None else judged, number, parameters)
                if patience and best is not None and number - best[1] >= patience * probe_every:
                    log.stopped = (
                        f"no better than at step {began + best[1] - 1} for {patience} probes"
                    )
                    break
                if settled is not None:
                    blend.refresh(leaves, current, only=only)
        if inner is not None:
            batches = inner(leaves, batches)
        terms = problem.backward(leaves, batches)
        total = sum(terms.values())
        taken = gradient(leaves, batches) is not False
        slopes = [p.grad for p in parameters if p.grad is not None]
        if not _finite(total) or not all(bool(s.isfinite().all()) for s in slopes):
            fault = blame(blend, leaves, terms, began + number)
            if not log.steps:
                raise fault
            log.stopped = str(fault)
            log.warn(f"{fault}; the coefficients of step {began + number - 1} are kept")
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
            break
        before = [p.detach().clone() for p in parameters]
        if schedule is not None:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(number - 1)
        if taken:
            optimiser.step()
            log.steps.append(Step(began + number, total, terms, agreement, judged))
        else:
            log.skipped += 1
        done = number
        if on_step is not None:
            on_step(stage, number, steps)
    if probe is not None and (probe.batches or judge is not None):
        blend.refresh(leaves, masks() if settled is None else settled(), only=only)
        last = probe.agreement(leaves)
        score = last if judge is None else judge(leaves)
        best = _better(best, score, done + 1, parameters)
        _diagnose(log, began, last, probe, leaves)
        if stop != "last" and best is not None:
            with torch.no_grad():
                for p, value in zip(parameters, best[2], strict=True):
                    p.copy_(value)
            log.best = began + best[1] - 1
    _check_size(blend, log)


def _head(batch: Batch) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:PROBE]
        return (
            {key: cut(inner) for key, inner in value.items()} if isinstance(value, dict) else value
        )

    return batch._replace(inputs=cut(batch.inputs))


def _better(
    best: tuple[float, int, list[Tensor]] | None,
    agreement: float | None,
    number: int,
    parameters: Sequence[Tensor],
) -> tuple[float, int, list[Tensor]] | None:
    if agreement is None or (best is not None and agreement <= best[0]):
        return best
    return agreement, number, [p.detach().clone() for p in parameters]


def _diagnose(log: Log, began: int, last: float | None, probe: Probe, leaves: Leaves) -> None:
    """Warn of the two ways an unsupervised objective goes wrong, as far as they can be seen."""
    seen = [step for step in log.steps[began:] if step.agreement is not None]
    if last is None or not seen:
        return
    top = max(step.agreement for step in seen if step.agreement is not None)
    falls = log.steps[-1].loss < seen[0].loss
    if falls and last < top - FALL:
        log.warn(
            f"the loss fell from {seen[0].loss:.3f} to {log.steps[-1].loss:.3f}, but the merged "
            f"model agrees with its experts on {last:.1%} of the probe inputs, after {top:.1%}: it "
            "grows sure without being right. Try stop='agreement', fewer steps, or a smaller lr"
        )
    for task, counts in probe.classes(leaves).items():
        named = sum(count > 0 for count in counts)
        wanted = next(n for b, n in probe.batches if b.task == task).unique().numel()
        if named == 1 and wanted > 2:
            log.warn(
                f"task {task}: the merged model names one class for every probe input, where its "
                f"expert names {wanted}; give the entropy a diversity > 0"
            )


def _check_size(blend: Blend, log: Log) -> None:
    raw = blend.coefficients.detach()
    if blend.clamp is not None:
        low, high = blend.clamp
        far = ((raw < low - RUNAWAY) | (raw > high + RUNAWAY)).flatten(1).any(1)
        if bool(far.any()):
            log.warn(
                f"{int(far.sum())} of {len(blend.rows)} rows of coefficients were thrown far out "
                f"of clamp = ({low:g}, {high:g}) and are held at its ends: try a smaller lr"
            )
        raw = raw.clamp(low, high)
    largest = raw.abs().flatten(1).amax(1)
    if bool((largest > RUNAWAY).any()):
        row = int(largest.argmax())
        log.warn(
            f"coefficients ran away: {float(largest[row]):.3g} at {blend.rows[row]}, and "
            f"{int((largest > RUNAWAY).sum())} of {len(blend.rows)} rows are beyond {RUNAWAY:g}. "
            "Try a smaller lr or weight decay; clamp=(low, high) if you want them held"
        )

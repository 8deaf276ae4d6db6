"""TAME: one expert for each stretch of a stream, found from losses, and a selector among them.

TAME: Task Agnostic Continual Learning using Multiple Experts, https://arxiv.org/abs/2210.03869,
sections 3.1 to 3.4; code at github.com/HaoranZhuExplorer/TAME, `utils_.py` and `prune.py`.

    batch      every expert's loss, in eval mode; the current one's smoothed loss above its
               threshold (see `drift`) gives the batch to the first expert that fits, or to a new one
    train      one step of SGD on cross-entropy by the expert that has the batch
    buffer     samples not seen before, with that expert's number: a reservoir of each class
    pruning    as an expert starts, the one before it: global L1, tuned on a reservoir of its own
    inference  e = argmax selector(x) for each sample, then expert e's prediction

Differs from the authors' code:

- it never calls its pruning of experts, which is done here as the paper has it (`prune=None`: not);
  a pruned expert that takes over again keeps its zeros, and `finish` prunes the last one;
- the pruning reservoir holds samples of the newest expert alone, also if an older one had batches;
- momentum of an expert that is not current is let go, for memory;
- classes across tasks are not known to whom tasks are not: without `classes`, the buffer's classes
  are pairs of expert and label.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, log
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pluribus.core.errors import InputError, MismatchError, NonFiniteError
from pluribus.core.random import key
from pluribus.core.shapes import Float, Int, Shaped
from pluribus.tasks.device import usable
from pluribus.train import prune
from pluribus.train.continual import tame_report, tame_state
from pluribus.train.continual.drift import LossShiftDetector, Switch
from pluribus.train.continual.network import stream
from pluribus.train.continual.reservoir import ClassReservoir, Reservoir
from pluribus.train.prune import Pruning, Tuning

CHUNK = 1024  # rows that are in a network at a time when nothing is learnt


@dataclass(frozen=True, kw_only=True)
class Tame:
    """Settings. Raises InputError for those that cannot be used."""

    alpha: float = 0.2  # smoothing of losses
    window: int = 35  # batches
    k_sigma: float = 3.0
    std_floor: float = 0.005  # nats
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 0  # steps of an expert over which its learning rate rises to lr
    milestones: tuple[int, ...] = ()  # steps of an expert after which it is multiplied by gamma
    gamma: float = 0.2
    head: Literal["logits", "sigmoid"] = "logits"  # what cross-entropy is taken of
    buffer: int = 5000  # samples
    classes: int | None = None  # of all tasks together; None: the buffer is for those seen so far
    prune: Pruning | None = field(default_factory=Pruning)
    prune_buffer: int = 500  # samples
    selector: Tuning = field(default_factory=lambda: Tuning(momentum=0.9, weight_decay=5e-4))
    prune_selector: Pruning | None = field(
        default_factory=lambda: Pruning(amount=0.5, tuning=Tuning(lr=1e-3))
    )
    max_experts: int | None = None
    lazy: bool = False  # ask for losses of other experts on an alarm alone

    def __post_init__(self) -> None:
        self.detector(2)
        Tuning(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.warmup < 0 or any(step < 1 for step in self.milestones):
            raise InputError(
                f"warmup = {self.warmup!r}, milestones = {self.milestones!r}: give steps"
            )
        if not (isfinite(self.gamma) and self.gamma > 0):
            raise InputError(f"gamma = {self.gamma!r}: give a factor above 0, such as 0.2")
        if self.head not in ("logits", "sigmoid"):
            raise InputError(f"head = {self.head!r}: there are 'logits' and 'sigmoid'")
        ClassReservoir(self.buffer, self.classes)
        Reservoir(self.prune_buffer)
        if self.max_experts is not None and self.max_experts < 1:
            raise InputError(f"max_experts = {self.max_experts!r}: give 1 or more, or None")

    def detector(self, outputs: int) -> LossShiftDetector:
        """Return a detector that starts at the loss of guessing among so many outputs."""
        return LossShiftDetector(
            self.alpha, self.window, self.k_sigma, self.std_floor, log(outputs)
        )

    def rate(self, steps: int) -> float:
        """Return the learning rate after so many steps of an expert."""
        rise = min(1.0, (steps + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * rise * self.gamma ** sum(steps >= at for at in self.milestones)


class Event(NamedTuple):
    """What became of a batch."""

    kind: Literal["same", "switch", "new"]
    expert: int  # that was trained on it
    threshold: float  # that `smoothed` was held against, nats
    loss: float  # of the expert that was trained, before the step
    smoothed: float  # of the expert that was current before
    alarm: bool
    forced: bool  # nobody fitted, and there may be no more experts
    losses: dict[int, float]  # of all experts that were evaluated, before the step


class Alarm(NamedTuple):
    """An entry of the log; an alarm that chose the same expert again is "same"."""

    batch: int  # from 0
    kind: Literal["same", "switch", "new"]
    before: int | None
    expert: int
    forced: bool


class Predicted(NamedTuple):
    """Labels, and the experts that gave them."""

    labels: Int[Tensor, " b"]
    experts: Int[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class Expert:
    """A network, and what its training needs."""

    net: nn.Module
    steps: int = 0
    optimiser: torch.optim.SGD | None = None  # of the current expert alone
    masks: prune.Masks | None = None  # once it is pruned


class TameLearner:
    """Learns from batches in their order, without being told where tasks begin.

    `make_expert` makes a new network each time: (b, ...) to (b, n_out) logits. `make_selector(n)`
    makes one with n outputs. Every random draw depends on `seed` and what it is for, and torch's
    own are left alone. Raises InputError for fewer than 2 outputs, or a device that is not there.
    """

    def __init__(
        self,
        make_expert: Callable[[], nn.Module],
        make_selector: Callable[[int], nn.Module],
        n_out: int,
        how: Tame | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        if n_out < 2:
            raise InputError(f"n_out = {n_out!r}: a classifier has 2 outputs or more")
        self.make_expert, self.make_selector = make_expert, make_selector
        self.n_out, self.how, self.seed = n_out, how or Tame(), seed
        self.device = torch.device(usable(device))
        self.batches, self.alarms = 0, ()
        self.shape: tuple[int, ...] | None = None  # of one sample
        self._experts: dict[int, Expert] = {}
        self._switch = self._switching()
        self._buffer = ClassReservoir(self.how.buffer, self.how.classes)
        self._young = Reservoir(self.how.prune_buffer)  # samples of the newest expert
        self._ids: set[int] = set()
        self.selector: nn.Module | None = None
        self.chosen_from: tuple[int, ...] = ()  # what the selector's outputs stand for
        self.selector_won: dict[int, int] = {}  # buffered samples that it gives to each expert

    # -- learning --------------------------------------------------------------------------------

    def observe(
        self,
        x: Shaped[Tensor, "b ..."],
        y: Int[Tensor, " b"],
        ids: Int[Tensor, " b"] | None = None,
        classes: Int[Tensor, " b"] | None = None,
    ) -> Event:
        """Take the next batch, and train the expert that has it by one step.

        Labels are 0 .. n_out - 1 in every task. `ids` tell samples that come again, which are
        buffered once; without them each counts as new. `classes` tell classes of the whole stream,
        between which the buffer is shared. Losses are of x as it is given: augment before, and the
        detector sees what augmentation does.

        Raises InputError for an empty batch, labels outside the range, or more classes than the
        buffer has room for; MismatchError for samples of another shape, or a network that does not
        fit; NonFiniteError for a loss or gradient that is none. Whatever is raised, an interruption
        among it, the learner is as it was before the batch.
        """
        x, y, fresh, names = self._checked(x, y, ids, classes)
        where = f"batch {self.batches}"
        experts, switch = dict(self._experts), self._switch.copy()

        def loss_of(number: int) -> float:
            if number not in experts:
                experts[number] = self._made(number, x)
            return self._loss(experts[number].net, x, y, f"{where}, expert {number}")

        decided = switch.decide(loss_of)
        if decided.kind == "new":
            young = Reservoir(self.how.prune_buffer)
            for number in set(experts) - {decided.expert}:
                experts[number] = self._pruned(experts[number], number)
        else:
            young = self._young.copy()
        for number in set(experts) - {decided.expert}:
            experts[number] = replace(experts[number], optimiser=None)
        rng = stream(self.seed, where, "priorities")
        buffer, rows = self._buffer.copy(), [i for i, new in enumerate(fresh) if new is not None]
        owners = [decided.expert * self.n_out + int(y[i]) for i in rows]
        keys = owners if names is None else [names[i] for i in rows]
        if rows:
            buffer.offer(x[rows], y[rows], decided.expert, keys, rng)
        one = experts[decided.expert]
        if rows and self.how.prune and one.masks is None and decided.expert == switch.made - 1:
            young.offer(x[rows], y[rows], rng)
        switch.take(decided.loss)
        alarms = self.alarms
        if decided.alarm or decided.kind != "same":
            entry = Alarm(
                self.batches, decided.kind, decided.before, decided.expert, decided.forced
            )
            alarms = (*alarms, entry)
        one = one if one.optimiser else replace(one, optimiser=self._optimiser(one.net))
        done = self.batches + 1
        saved = deepcopy((one.net.state_dict(), one.optimiser.state_dict()))  # type: ignore[union-attr]
        marked = {new for new in fresh if new is not None}
        try:
            self._step(one, x, y, where)
            experts[decided.expert] = replace(one, steps=one.steps + 1)
            self._ids |= marked
            self.__dict__.update(  # one call, which no signal divides
                _experts=experts,
                _switch=switch,
                _buffer=buffer,
                _young=young,
                alarms=alarms,
                shape=tuple(x.shape[1:]),
                batches=done,
            )
        except BaseException:
            if self.batches != done:
                one.net.load_state_dict(saved[0])
                one.optimiser.load_state_dict(saved[1])  # type: ignore[union-attr]
                self._ids -= marked
            raise
        return Event(
            decided.kind,
            decided.expert,
            decided.threshold,
            decided.loss,
            decided.smoothed,
            decided.alarm,
            decided.forced,
            decided.losses,
        )

    def finish(self) -> None:
        """Prune the experts that no later one has pruned: the newest, at the end of the stream.

        It keeps its zeros if it is trained again. Does nothing without `prune`.
        """
        experts = {number: self._pruned(one, number) for number, one in self._experts.items()}
        self._experts = experts

    def fit_selector(self) -> "tame_report.Fitted":
        """Train the selector on the buffer, anew, and return how well it knows its experts.

        With one expert there is nothing to select. Raises InputError before the first batch, and
        what `tune` raises.
        """
        numbers = self._some()
        kept = self._buffer.kept()
        fitted = None
        if len(numbers) > 1:
            place = {number: i for i, number in enumerate(numbers)}
            labels = torch.tensor([place[owner] for owner in kept.owner.tolist()])
            with self._drawing(f"selector {self.batches}"):
                fitted = self.make_selector(len(numbers)).to(self.device)
                self._probed(fitted, kept.x[:2].to(self.device), len(numbers), "the selector")
                rng = stream(self.seed, f"selector {self.batches}", "shuffling")
                prune.tune(fitted, kept.x, labels, self.how.selector, rng)
                if self.how.prune_selector:
                    prune.prune(fitted, kept.x, labels, self.how.prune_selector, rng)
        chosen = self._choice(fitted, numbers, kept.x)
        won = {number: int((chosen == number).sum()) for number in numbers}
        self.__dict__.update(selector=fitted, chosen_from=numbers, selector_won=won)
        right = float((chosen == kept.owner).float().mean())
        return tame_report.Fitted(len(kept.y), len(numbers), right, won)

    # -- asking ----------------------------------------------------------------------------------

    @property
    def experts(self) -> dict[int, nn.Module]:
        """The networks by number, in the order of their creation, in eval mode."""
        return {number: one.net for number, one in self._experts.items()}

    @property
    def current(self) -> int | None:
        """The number of the expert that had the last batch."""
        return self._switch.current

    def predict(
        self,
        x: Shaped[Tensor, "b ..."],
        return_expert: bool = False,
        *,
        class_incremental: bool = False,
    ) -> Int[Tensor, " b"] | Predicted:
        """Return labels on the CPU, each from the expert that the selector chose for its sample.

        With `class_incremental` a label is n_out times its expert's number more. Raises InputError
        before the first batch or without samples, and if experts are more than one and no selector
        was fitted since the last came; MismatchError for samples of another shape.
        """
        numbers = self._some()
        self._fitting(x)
        if len(numbers) > 1 and self.chosen_from != numbers:
            since = "since the selector was fitted" if self.selector else "and no selector yet"
            raise InputError(
                f"there are {len(numbers)} experts, {since}: call fit_selector() first"
            )
        experts = self._choice(self.selector, numbers, x)
        labels = torch.empty(len(x), dtype=torch.long)
        for number in experts.unique().tolist():
            rows = experts == number
            labels[rows] = self.logits(x[rows.to(x.device)], number).argmax(1)
        if class_incremental:
            labels = labels + self.n_out * experts
        return Predicted(labels, experts) if return_expert else labels

    def logits(self, x: Shaped[Tensor, "b ..."], expert: int) -> Float[Tensor, "b c"]:
        """Return one expert's logits on the CPU. Raises InputError for a number that is not one."""
        if expert not in self._experts:
            known = ", ".join(map(str, self._experts)) or "none"
            raise InputError(f"there is no expert {expert!r}; there are: {known}")
        self._fitting(x)
        return self._outputs(self._experts[expert].net, x)

    # -- fewer experts ---------------------------------------------------------------------------

    def drop_unused(self) -> tuple[int, ...]:
        """Drop experts that win no buffered sample, and return their numbers.

        The expert with the lowest loss on a sample wins it; those that the dropped ones left behind
        go to their winners. The current expert stays. A selector must be fitted anew.
        """
        self._some()
        losses, kept = self._sample_losses()
        numbers = list(self._experts)
        best = losses.argmin(0)
        won = torch.bincount(best, minlength=len(numbers)).tolist()
        unused = [n for n, wins in zip(numbers, won, strict=True) if not wins and n != self.current]
        if unused:
            winner = dict(zip(map(tuple, self._rows(kept)), best.tolist(), strict=True))
            self._without({n: self._now() for n in unused}, numbers, winner)
        return tuple(unused)

    def merge(self, tolerance: float = 0.0) -> dict[int, int]:
        """Drop experts whose buffered samples another one fits, and return which took them over.

        A fits if its mean loss on the other's samples is below its own threshold plus `tolerance`
        nats, the rule by which it would have taken over the stream. The newest are tried first,
        each against the one with the lowest loss. A selector must be fitted anew.
        """
        self._some()
        losses, kept = self._sample_losses()
        numbers, merged = list(self._experts), {}
        for number in reversed(numbers):
            owners = {number, *(one for one, into in merged.items() if into == number)}
            mine = torch.isin(kept.owner, torch.tensor(sorted(owners)))
            others = [n for n in numbers if n != number and n not in merged]
            if not mine.any() or not others:
                continue
            means = {n: float(losses[numbers.index(n)][mine].mean()) for n in others}
            into = min(means, key=means.__getitem__)
            threshold = self._switch.detectors[into].threshold
            if threshold is not None and means[into] < threshold + tolerance:
                merged |= {one: into for one in owners}
        if merged:
            self._without(merged, numbers, None)
        return dict(sorted(merged.items()))

    # -- telling and keeping ---------------------------------------------------------------------

    def report(self) -> "tame_report.Report":
        """Return what was found and learned, with warnings; `str` of it is for people."""
        return tame_report.report(self)

    def settings(self) -> dict[str, Any]:
        """Return what a state was made with, as plain values."""
        return {"n_out": self.n_out, "seed": self.seed, **asdict(self.how)}

    def state_dict(self) -> dict[str, Any]:
        """Return everything with which a learner goes on bit for bit: tensors and plain values.

        `torch.load(..., weights_only=True)` reads what `torch.save` writes of it.
        """
        return tame_state.state_dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the learner of a state, or stay as before if it cannot be.

        Raises FormatError for what is no state, MismatchError for one of other settings, or of
        networks that are not what the factories make.
        """
        tame_state.load(self, state)

    # -- inside ----------------------------------------------------------------------------------

    def _switching(self) -> Switch:
        make = lambda: self.how.detector(self.n_out)  # noqa: E731
        return Switch(make, self.how.max_experts, self.how.lazy)

    def _some(self) -> tuple[int, ...]:
        if not self._experts:
            raise InputError("there is no expert yet: observe a batch first")
        return tuple(self._experts)

    def _now(self) -> int:
        assert self.current is not None
        return self.current

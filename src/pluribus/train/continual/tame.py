"""TAME: one expert for each stretch of a stream, found from losses, and a selector among them.

TAME: Task Agnostic Continual Learning using Multiple Experts, https://arxiv.org/abs/2210.03869,
sections 3.1 to 3.4; code at github.com/HaoranZhuExplorer/TAME, `utils_.py` and `prune.py`.

    batch      every expert's loss, in eval mode; if the current one's, smoothed, is above its
               threshold (see `drift`), the first expert that fits has the batch, or a new one
    train      one step of SGD on cross-entropy by the expert that has the batch
    buffer     samples not seen before, with that expert's number: a reservoir of each class
    pruning    as an expert starts, the one before it: global L1, tuned on a reservoir of its own
    inference  e = argmax selector(x) for each sample, then expert e's prediction

Differs from the authors' code:

- it never calls its pruning of experts, which is done here as the paper has it (`prune=None`: not);
  a pruned expert that takes over again keeps its zeros, and `finish` prunes the last one;
- the pruning reservoir holds samples of the newest expert alone, each once, also those that an
  expert before it has seen: one that starts in a later epoch would never be pruned otherwise;
- momentum of an expert that is not current is let go, for memory;
- classes across tasks are not known to whom tasks are not: without `classes`, the buffer's classes
  are pairs of expert and label.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, log
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError, MismatchError
from pluribus.core.shapes import Float, Int, Shaped
from pluribus.tasks.device import usable
from pluribus.train import prune
from pluribus.train.continual import tame_merge, tame_report, tame_state
from pluribus.train.continual.drift import LossShiftDetector, Switch
from pluribus.train.continual.expert import Expert, Head, Networks
from pluribus.train.continual.network import stream
from pluribus.train.continual.reservoir import ClassReservoir, Kept, Reservoir
from pluribus.train.prune import Pruning, Tuning


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
    head: Head = "logits"  # what cross-entropy is taken of
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


class Batch(NamedTuple):
    """A batch that can be learned from."""

    x: Shaped[Tensor, "b ..."]
    y: Int[Tensor, " b"]
    rows: list[int]  # of samples not seen before
    ids: set[int]  # of those
    classes: list[int] | None  # of those, where classes are told
    given: list[int] | None  # ids of all samples


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
        self.networks = Networks(n_out, self.how.head, self.device, seed)
        self.batches = 0
        self.alarms: tuple[Alarm, ...] = ()
        self.shape: tuple[int, ...] | None = None  # of one sample
        self.named: bool | None = None  # whether classes are told
        self.kept_experts: dict[int, Expert] = {}  # in the order of their creation
        self.switch = self.switching()
        self.buffer = ClassReservoir(self.how.buffer, self.how.classes)
        self.young = Reservoir(self.how.prune_buffer)
        self.young_of: int | None = None  # the expert whose samples `young` holds
        self.ids: set[int] = set()  # of samples offered to the buffer
        self.young_ids: set[int] = set()  # of samples offered to `young`
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
        between which the buffer is shared. Losses are of x as given, augmentation included.

        Raises InputError for an empty batch, labels outside the range, or more classes than the
        buffer has room for; MismatchError for samples of another shape, or a network that does not
        fit; NonFiniteError for a loss or gradient that is none. Whatever is raised, an interruption
        among it, the learner is as it was before the batch.
        """
        batch = self._checked(x, y, ids, classes)
        where = f"batch {self.batches}"
        experts, switch = dict(self.kept_experts), self.switch.copy()

        def loss_of(number: int) -> float:
            if number not in experts:
                nets = tuple(one.net for one in experts.values())
                purpose = f"expert {number}"
                net = self.networks.made(self.make_expert, purpose, batch.x, others=nets)
                experts[number] = Expert(net)
            name = f"{where}, expert {number}"
            return self.networks.measured(experts[number].net, batch.x, batch.y, name)

        decided = switch.decide(loss_of)
        young, young_of, young_ids = self.young.copy(), self.young_of, self.young_ids
        if decided.kind == "new":
            if young_of is not None:
                experts[young_of] = self._pruned(young_of)
            young, young_of, young_ids = Reservoir(self.how.prune_buffer), decided.expert, set()
        experts = {
            n: one if n == decided.expert else replace(one, optimiser=None)
            for n, one in experts.items()
        }
        one = experts[decided.expert]
        buffer = self._offered(batch, decided.expert, where)
        added: set[int] = set()
        if self.how.prune and one.masks is None and young_of == decided.expert:
            rows, added = _unseen(batch.given, len(y), young_ids)
            if rows:
                rng = stream(self.seed, where, "pruning priorities")
                young.offer(batch.x[rows], batch.y[rows], rng)
        switch.take(decided.loss)
        alarms = self.alarms
        if decided.alarm or decided.kind != "same":
            alarms = (
                *alarms,
                Alarm(self.batches, decided.kind, decided.before, decided.expert, decided.forced),
            )
        if one.optimiser is None:
            one = replace(one, optimiser=self.optimiser(one.net))
        experts[decided.expert] = replace(one, steps=one.steps + 1)
        self._committed(
            one,
            batch,
            added,
            where,
            kept_experts=experts,
            switch=switch,
            buffer=buffer,
            young=young,
            young_of=young_of,
            young_ids=young_ids,
            alarms=alarms,
            shape=tuple(x.shape[1:]),
            named=classes is not None,
            batches=self.batches + 1,
        )
        _, expert, _, loss, threshold, smoothed, alarm, forced, losses = decided
        return Event(decided.kind, expert, threshold, loss, smoothed, alarm, forced, losses)

    def finish(self) -> None:
        """Prune the newest expert, which no later one did: at the end of the stream.

        It keeps its zeros if it is trained again. Does nothing without `prune`.
        """
        if self.young_of is not None:
            one = self._pruned(self.young_of)
            self.kept_experts = {**self.kept_experts, self.young_of: one}

    def fit_selector(self) -> "tame_report.Fitted":
        """Train the selector on the buffer, anew, and return how well it knows its experts.

        With one expert there is nothing to select. Raises InputError before the first batch, and
        what `tune` and `prune` raise; the selector before then stays.
        """
        numbers, kept, how = self._some(), self.buffered(), self.how
        fitted = None
        if len(numbers) > 1:
            place = {number: i for i, number in enumerate(numbers)}
            labels = torch.tensor([place[owner] for owner in kept.owner.tolist()])
            purpose = f"selector {self.batches}"
            fitted = self.networks.made(
                lambda: self.make_selector(len(numbers)), purpose, kept.x, len(numbers)
            )
            rng = stream(self.seed, purpose, "shuffling")
            with self.networks.drawing(f"{purpose} training"):
                prune.tune(fitted, kept.x, labels, how.selector, rng)
                if how.prune_selector:
                    prune.prune(fitted, kept.x, labels, how.prune_selector, rng)
        chosen = self._choice(fitted, numbers, kept.x)
        won = {number: int((chosen == number).sum()) for number in numbers}
        self.__dict__.update(selector=fitted, chosen_from=numbers, selector_won=won)
        right = float((chosen == kept.owner).float().mean())
        return tame_report.Fitted(len(kept.y), len(numbers), right, won)

    # -- asking ----------------------------------------------------------------------------------

    @property
    def experts(self) -> dict[int, nn.Module]:
        """The networks by number, in the order of their creation, in eval mode."""
        return {number: one.net for number, one in self.kept_experts.items()}

    @property
    def current(self) -> int | None:
        """The number of the expert that had the last batch."""
        return self.switch.current

    def threshold(self, expert: int) -> float | None:
        """Return an expert's threshold as it was last computed, in nats."""
        return self.switch.detectors[expert].threshold

    def buffered(self) -> Kept:
        """Return the buffered samples, their labels and their experts."""
        return self.buffer.kept()

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
        self._fitting(x, "predict")
        if len(numbers) > 1 and self.chosen_from != numbers:
            since = "more than the selector knows" if self.selector else "and no selector yet"
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
        if expert not in self.kept_experts:
            known = ", ".join(map(str, self.kept_experts)) or "none"
            raise InputError(f"there is no expert {expert!r}; there are: {known}")
        self._fitting(x, "logits")
        return self.networks.asked(self.kept_experts[expert].net, x)

    # -- fewer experts ---------------------------------------------------------------------------

    def drop_unused(self) -> tuple[int, ...]:
        """Drop experts that win no buffered sample, and return their numbers.

        The expert with the lowest loss on a sample wins it; those of a dropped one go to their
        winners. The current expert stays. A selector must be fitted anew.
        """
        self._some()
        return tame_merge.unused(self)

    def merge(self, tolerance: float = 0.0) -> dict[int, int]:
        """Drop experts whose buffered samples another one fits, and return which took them over.

        One fits if its mean loss on the other's samples is below its own threshold plus `tolerance`
        nats, the rule by which it would have taken over the stream. The newest are tried first,
        each against the one with the lowest loss. A selector must be fitted anew. Raises InputError
        for a tolerance that is no number.
        """
        if not isfinite(tolerance):
            raise InputError(f"tolerance = {tolerance!r}: give nats, such as 0.05")
        self._some()
        return tame_merge.merged(self, tolerance)

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

    def switching(self) -> Switch:
        """Return a switch without experts, of these settings."""
        how, outputs = self.how, self.n_out
        return Switch(lambda: how.detector(outputs), how.max_experts, how.lazy)

    def optimiser(self, net: nn.Module) -> torch.optim.SGD:
        """Return an optimiser without momentum yet."""
        how = self.how
        return torch.optim.SGD(
            net.parameters(), lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay
        )

    # -- inside ----------------------------------------------------------------------------------

    def _checked(self, x: Tensor, y: Tensor, ids: Tensor | None, classes: Tensor | None) -> Batch:
        where = f"batch {self.batches}"
        if y.ndim != 1 or len(x) != len(y) or y.is_floating_point():
            raise InputError(
                f"{where}: x is {list(x.shape)} and y {y.dtype}{list(y.shape)}; expected samples "
                "and one whole number for each"
            )
        self._fitting(x, where)
        if int(y.min()) < 0 or int(y.max()) >= self.n_out:
            raise InputError(
                f"{where}: labels span {int(y.min())} .. {int(y.max())}, but experts have the "
                f"labels 0 .. {self.n_out - 1}; number the classes of each task from 0"
            )
        for name, given in (("ids", ids), ("classes", classes)):
            if given is not None and (given.shape != y.shape or given.is_floating_point()):
                raise InputError(
                    f"{where}: {name} are {given.dtype}{list(given.shape)} for {len(y)} samples; "
                    "expected one whole number for each"
                )
        if self.named is not None and self.named != (classes is not None):
            raise InputError(f"{where}: give classes with every batch, or with none")
        given = None if ids is None else ids.tolist()
        rows, new = _unseen(given, len(y), self.ids)
        names = None if classes is None else [int(classes[row]) for row in rows]
        return Batch(x.to(self.device), y.to(self.device).long(), rows, new, names, given)

    def _offered(self, batch: Batch, expert: int, where: str) -> ClassReservoir:
        """Return the buffer with the samples of a batch that are new."""
        if not batch.rows:
            return self.buffer
        out, y = self.buffer.copy(), batch.y[batch.rows]
        names = [expert * self.n_out + label for label in y.tolist()]
        rng = stream(self.seed, where, "priorities")
        out.offer(batch.x[batch.rows], y, expert, batch.classes or names, rng)
        return out

    def _committed(
        self, one: Expert, batch: Batch, added: set[int], where: str, **state: Any
    ) -> None:
        """Train an expert and take a new state, both or neither."""
        before, saved = self.batches, one.saved()
        try:
            assert one.optimiser is not None
            for group in one.optimiser.param_groups:
                group["lr"] = self.how.rate(one.steps)
            self.networks.step(one, batch.x, batch.y, where)
            self.ids |= batch.ids
            state["young_ids"] |= added
            self.__dict__.update(state)  # one call, which no signal divides
        except BaseException:
            if self.batches == before:
                one.restore(saved)
                self.ids -= batch.ids
                state["young_ids"] -= added
            raise

    def _pruned(self, number: int) -> Expert:
        one = self.kept_experts[number]
        if self.how.prune is None or one.masks is not None or not len(self.young):
            return one
        return self.networks.pruned(one, self.young, self.how.prune, f"pruning {number}")

    def _choice(
        self, selector: nn.Module | None, numbers: tuple[int, ...], x: Tensor
    ) -> Int[Tensor, " b"]:
        if selector is None:
            return torch.full((len(x),), numbers[0])
        return torch.tensor(numbers)[self.networks.asked(selector, x).argmax(1)]

    def _fitting(self, x: Tensor, where: str) -> None:
        if not len(x):
            raise InputError(f"{where}: there are no samples")
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise MismatchError(
                f"{where}: a sample is {list(x.shape[1:])}, but those before were "
                f"{list(self.shape)}; all experts take the same"
            )

    def _some(self) -> tuple[int, ...]:
        if not self.kept_experts:
            raise InputError("there is no expert yet: observe a batch first")
        return tuple(self.kept_experts)


def _unseen(ids: list[int] | None, count: int, seen: set[int]) -> tuple[list[int], set[int]]:
    """Return the rows whose ids were not seen, each once, and those ids."""
    if ids is None:
        return list(range(count)), set()
    rows, new = [], set()
    for row, number in enumerate(ids):
        if number not in seen and number not in new:
            rows.append(row)
            new.add(number)
    return rows, new

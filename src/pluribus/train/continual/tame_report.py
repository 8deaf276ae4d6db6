"""What a stream learner found, what it stores, and where not to trust it.

An expert has learned once its threshold was below ln c, the loss of guessing: only then does a
fall back to guessing show. An expert that never got there cannot reveal a shift, and a stream that
left one expert behind in that state was not found to be one task; nothing was found. One that has
learned becomes as blind again if its loss rises back, which is told of the current one.
"""

from dataclasses import asdict, dataclass
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

from pluribus.train.prune import nonzeros

if TYPE_CHECKING:
    from pluribus.train.continual.tame import TameLearner


class Fitted(NamedTuple):
    """How a selector does on the samples that it was trained on."""

    samples: int
    experts: int
    accuracy: float  # share of the samples given to the expert that had their batch
    won: dict[int, int]  # samples given to each expert


@dataclass(frozen=True)
class Told:
    """One expert; losses in nats."""

    number: int
    steps: int
    loss: float | None  # smoothed, over the batches that it was trained on
    threshold: float | None
    lowest_threshold: float | None
    learned: bool
    pruned: bool
    nonzeros: int  # of its parameters
    samples: int  # of it in the buffer


@dataclass(frozen=True)
class Report:
    """State of a learner."""

    batches: int
    current: int | None
    chance: float  # the loss of guessing, nats
    experts: tuple[Told, ...]
    learned: tuple[int, ...]  # experts whose threshold was once below chance
    made: int  # experts that were ever made
    switches: int  # back to an expert that was there
    spurious: int  # alarms that chose the same expert again
    forced: int  # alarms at max_experts that no expert fitted
    buffered: int
    seen: int  # samples offered to the buffer
    selector: tuple[int, ...]  # the experts that it chooses from
    stored: int  # numbers other than 0 in experts and selector
    dense: int  # parameters of one expert
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kept = f"{self.stored} numbers" + (
            f", {self.stored / self.dense:.2f} dense experts" if self.dense else ""
        )
        lines = [
            f"stream      {self.batches} batches; {self.made} experts made, {self.switches} "
            f"switches back, {self.spurious} spurious alarms",
            f"experts     {len(self.experts)} kept, {len(self.learned)} of them learned "
            f"(chance {self.chance:.3f} nats)",
            f"buffer      {self.buffered} of {self.seen} samples",
            f"stored      {kept}",
        ]
        lines += [
            f"  {one.number:3d}       {one.steps} steps, loss {_nats(one.loss)}, threshold "
            f"{_nats(one.threshold)}, {one.samples} buffered{', pruned' if one.pruned else ''}"
            + ("" if one.learned else ", NEVER LEARNED")
            for one in self.experts
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def report(learner: "TameLearner") -> Report:
    """Return the report of a learner, also of one that has seen nothing."""
    chance = log(learner.n_out)
    owners = learner.buffered().owner.tolist() if len(learner.buffer) else []
    experts = []
    for number, one in learner.kept_experts.items():
        found = learner.switch.detectors[number]
        learned = one.steps > 0 and found.lowest is not None and found.lowest < chance
        experts.append(
            Told(
                number=number,
                steps=one.steps,
                loss=found.settled,
                threshold=found.threshold,
                lowest_threshold=found.lowest,
                learned=learned,
                pruned=one.masks is not None,
                nonzeros=nonzeros(one.net),
                samples=owners.count(number),
            )
        )
    nets = list(learner.experts.values())
    selector = 0 if learner.selector is None else nonzeros(learner.selector)
    alarms = learner.alarms
    kinds = [alarm.kind for alarm in alarms if not alarm.forced]
    return Report(
        batches=learner.batches,
        current=learner.current,
        chance=chance,
        experts=tuple(experts),
        learned=tuple(one.number for one in experts if one.learned),
        made=learner.switch.made,
        switches=kinds.count("switch"),
        spurious=kinds.count("same"),
        forced=sum(alarm.forced for alarm in alarms),
        buffered=len(learner.buffer),
        seen=learner.buffer.seen,
        selector=learner.chosen_from,
        stored=sum(one.nonzeros for one in experts) + selector,
        dense=sum(p.numel() for p in nets[0].parameters()) if nets else 0,
        warnings=tuple(_warnings(learner, experts, chance)),
    )


def _warnings(learner: "TameLearner", experts: list[Told], chance: float) -> list[str]:
    notes = []
    learned = [one.number for one in experts if one.learned]
    if experts and not learned:
        notes.append(
            f"no expert ever learned: no threshold was below the loss of guessing ({chance:.3f} "
            "nats), so that no shift could show, and one expert does not mean one task; try more "
            'steps a task, another learning rate, or head="logits"'
        )
    elif failed := [one.number for one in experts if not one.learned]:
        notes.append(
            f"{_numbers(failed)} never learned and may be the work of false alarms or of a short "
            "stretch; drop_unused() or merge() may do without"
        )
    now = next((one for one in experts if one.number == learner.current), None)
    if now and now.learned and now.threshold is not None and now.threshold >= chance:
        notes.append(
            f"the current expert's threshold ({now.threshold:.3f} nats) is not below the loss of "
            f"guessing ({chance:.3f}): a shift to a task that nobody knows cannot show now"
        )
    if forced := sum(alarm.forced for alarm in learner.alarms):
        notes.append(
            f"{forced} alarm(s) fitted no expert and there were max_experts = "
            f"{learner.how.max_experts} of them; the nearest took over and may have forgotten"
        )
    if len(experts) > 1 and learner.chosen_from != tuple(learner.experts):
        notes.append("the selector is not of these experts: call fit_selector() before predict()")
    elif starved := [number for number, won in learner.selector_won.items() if not won]:
        notes.append(f"the selector chooses {_numbers(starved)} for none of the buffered samples")
    if len(experts) > 10 and sum(one.steps for one in experts) < learner.how.window * len(experts):
        notes.append(
            f"{len(experts)} experts share {learner.batches} batches, fewer than a window each: "
            "tasks that are mixed within batches, or noise, look like this; give max_experts"
        )
    return notes


def _numbers(numbers: list[int]) -> str:
    return f"expert{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _nats(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"

"""Fewer experts after a stream: those that win nothing go, those that fit the same become one.

False alarms leave experts behind. Both passes look at the buffered samples, whose labels are known,
and give the samples of an expert that goes to one that stays.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pluribus.core.shapes import Float
from pluribus.train.continual.reservoir import Kept, Reservoir, Row

if TYPE_CHECKING:
    from pluribus.train.continual.tame import TameLearner


def unused(learner: "TameLearner") -> tuple[int, ...]:
    """Drop the experts that have the lowest loss on no buffered sample; the current one stays."""
    losses, kept = _losses(learner)
    numbers = list(learner.experts)
    best = losses.argmin(0).tolist()
    gone = tuple(n for i, n in enumerate(numbers) if i not in best and n != learner.current)
    if gone:
        rows = zip(kept.arrival.tolist(), kept.owner.tolist(), best, strict=True)
        owners = {at: numbers[one] if was in gone else was for at, was, one in rows}
        _drop(learner, dict.fromkeys(gone, -1), owners)
    return gone


def merged(learner: "TameLearner", tolerance: float) -> dict[int, int]:
    """Drop the experts whose samples another one fits, the newest first."""
    losses, kept = _losses(learner)
    numbers, gone = list(learner.experts), {}
    for number in reversed(numbers):
        owners = {number, *(one for one, into in gone.items() if into == number)}
        mine = torch.isin(kept.owner, torch.tensor(sorted(owners)))
        others = [one for one in numbers if one != number and one not in gone]
        if not others or not mine.any():
            continue
        means = {one: float(losses[numbers.index(one)][mine].mean()) for one in others}
        into = min(means, key=means.__getitem__)
        threshold = learner.threshold(into)
        if threshold is not None and means[into] < threshold + tolerance:
            gone |= dict.fromkeys(owners, into)
    if gone:
        rows = zip(kept.arrival.tolist(), kept.owner.tolist(), strict=True)
        _drop(learner, gone, {at: gone.get(was, was) for at, was in rows})
    return dict(sorted(gone.items()))


def _losses(learner: "TameLearner") -> tuple[Float[Tensor, "t b"], Kept]:
    kept = learner.buffered()
    out = []
    for number in learner.experts:
        logits = learner.logits(kept.x, number)
        logits = logits.sigmoid() if learner.how.head == "sigmoid" else logits
        out.append(cross_entropy(logits, kept.y, reduction="none"))
    return torch.stack(out), kept


def _drop(learner: "TameLearner", gone: dict[int, int], owners: dict[int, int]) -> None:
    def owner_of(row: Row) -> int:
        return owners[row[1]]

    def class_of(key: int, label: int, owner: int) -> int:
        return key if learner.named else owner * learner.n_out + label

    switch = learner.switch.copy()
    for number, into in gone.items():
        switch.drop(number, into)
    young, young_of = learner.young, learner.young_of
    if young_of in gone:
        young, young_of = Reservoir(young.capacity), None
    learner.__dict__.update(
        kept_experts={n: one for n, one in learner.kept_experts.items() if n not in gone},
        switch=switch,
        buffer=learner.buffer.reassigned(owner_of, class_of),
        young=young,
        young_of=young_of,
        young_ids=learner.young_ids if young_of is not None else set(),
        selector=None,
        chosen_from=(),
        selector_won={},
    )

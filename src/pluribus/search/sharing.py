"""What algorithms with shared weights have in common: begin, train a choice, derive, train anew."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.random import key
from pluribus.search.decisions import Choice
from pluribus.search.space import Space
from pluribus.search.study import Session
from pluribus.search.supernet import SuperNet, batch_statistics, supernet
from pluribus.search.training import Examples, Training, set_rate

ENDLESS = 1 << 30  # epochs of a stream that whoever reads it ends


class Shared:
    """A search with shared weights in progress: the network, its training, the clock."""

    def __init__(
        self, name: str, space: Space, evaluate: Any, session: Session, epochs: int, **changes: Any
    ) -> None:
        if not isinstance(evaluate, Training):
            raise InputError(
                f"{name} trains all points in one network, so it needs to know how: give "
                "evaluate = pluribus.search.training.Training(build=..., train=..., val=...), "
                f"which every algorithm takes; got {evaluate!r}"
            )
        self.name, self.space, self.session = name, space, session
        self.alone = evaluate  # how the points that are found are trained in the end
        self.training = dataclasses.replace(evaluate, seed=session.seed, **changes)
        self.began = time.perf_counter()
        self.net: SuperNet = supernet(
            space, evaluate.build, evaluate.train.x[:8], seed=session.seed
        ).to(evaluate.device)
        self.optimiser = self.training.optimiser(self.net)
        self.total = epochs * self.training.steps
        self.step = 0
        self._val: Iterator[Examples] = self.training.batches(
            f"{name} validation", ENDLESS, evaluate.val
        )

    def decoded(self, choice: Choice) -> Any:
        """Return the object that a choice makes of the space."""
        return self.space.decode(self.net.dna(choice))

    def rng(self, purpose: str) -> Generator:
        """Return a generator named after its purpose."""
        return Generator().manual_seed(key(self.session.seed, self.name, purpose))

    def batches(self) -> Iterator[Examples]:
        """Yield training batches until all epochs are over or the session's time is used up."""
        epochs = self.total // self.training.steps
        for batch in self.training.batches(f"{self.name} weights", epochs):
            if self.session.over:
                self.session.notes.append(
                    f"{self.name}: the time was up after {self.step} of {self.total} steps of the "
                    "shared weights; what they favour by then was trained anew"
                )
                return
            yield batch

    @property
    def epoch_ended(self) -> bool:
        """Whether the last step was an epoch's last."""
        return self.step % self.training.steps == 0

    @property
    def rate(self) -> float:
        """The learning rate of the weights at this step."""
        return self.training.rate(self.step, self.total)

    def descend(self, batch: Examples, choice: Mapping[str, int | Tensor]) -> None:
        """Take one step of the shared weights. Raises NonFiniteError if the loss is not finite."""
        self.net.train()
        set_rate(self.optimiser, self.rate)
        loss = self.training.loss(self.net(batch.x, choice), batch.y)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"{self.name}: the loss is {float(loss.detach())} at step {self.step} of the "
                f"shared weights; try a smaller learning rate than {self.training.lr:g}"
            )
        self.training.descend(self.optimiser, self.net, loss)
        self.step += 1

    def validation(self) -> Examples:
        """Return the next validation batch."""
        return next(self._val)

    def quality(self, choice: Choice, batch: Examples) -> float:
        """Return the score of a choice with shared weights on a batch."""
        with batch_statistics(self.net), torch.no_grad():
            return self.training.score(self.net(batch.x, choice), batch.y)

    def best(self, choices: Iterable[Choice], count: int, images: int = 1000) -> list[Choice]:
        """Return the `count` best of some choices on the first validation images, best first."""
        x, y = self.alone.val
        device = self.training.device
        batch = Examples(x[:images].to(device), y[:images].to(device))
        rated: dict[tuple[tuple[str, int], ...], float] = {}
        for choice in choices:
            name = tuple(choice.items())
            if name not in rated:
                rated[name] = self.quality(choice, batch)
        return [dict(name) for name in sorted(rated, key=lambda name: -rated[name])[:count]]

    def train_anew(self, choices: Iterable[Choice], told: Mapping[str, Any]) -> None:
        """Train choices alone, from new weights, and record what they score.

        At least one is trained however late it is, or the search would end with nothing.
        """
        report = {
            "shared_seconds": round(time.perf_counter() - self.began, 3),
            "shared_steps": self.step,
            **told,
        }
        for number, choice in enumerate(choices):
            if number and self.session.over:
                return
            dna = self.net.dna(choice)
            if any(trial.dna == dna for trial in self.session.known):
                continue
            began = time.perf_counter()
            score = self.alone(self.space.decode(dna))
            seconds = time.perf_counter() - began
            self.session.record(dna, score, report=report, seconds=seconds)


def remembered(value: Callable[[Choice], float]) -> Callable[[Choice], float]:
    """Return a function of a choice that computes each value once."""
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def of(choice: Choice) -> float:
        name = tuple(choice.items())
        if name not in known:
            known[name] = value(choice)
        return known[name]

    return of

"""Shifts of a loss, and which of several experts a stream belongs to, from losses alone.

TAME: Task Agnostic Continual Learning using Multiple Experts,
https://arxiv.org/abs/2210.03869, section 3; code at github.com/HaoranZhuExplorer/TAME.

    window     the last W losses before a training step, at first ln c, the loss of guessing
    threshold  mean(window) + k max(std(window), floor)          population std, nats
    smoothed   alpha loss + (1 - alpha) smoothed                 over every batch
    settled    alpha loss + (1 - alpha) settled                  over batches trained on
    alarm      smoothed > threshold

With a constant loss the threshold is k floor above it (0.015 nats), so that a jump by D alarms at
once if and only if alpha D is more than that; later batches raise the threshold too.

On an alarm the first expert, in the order of their creation, whose `settled` with this batch's loss
stays below its last threshold takes over, and if there is none a new one does. The scan includes
the expert that alarmed. Until an expert takes over its `smoothed` holds losses of other tasks, so
that the next batch may alarm and choose it again; nothing is lost by that.
"""

from collections import deque
from collections.abc import Callable
from math import fsum, isfinite, sqrt
from typing import Any, Literal, NamedTuple

from pluribus.core.errors import InputError, NonFiniteError


class LossShiftDetector:
    """Tells when a loss has left its range of the last batches that were trained on.

    `start` is the loss before any training, ln c for c classes; without one nothing alarms before
    the first batch was trained on. Raises InputError for a smoothing factor outside (0, 1], a
    window of less than 2, and `k_sigma` or `std_floor` not above 0.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        window: int = 35,
        k_sigma: float = 3.0,
        std_floor: float = 0.005,
        start: float | None = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise InputError(f"alpha = {alpha!r}: give a smoothing factor above 0 and up to 1")
        if window < 2:
            raise InputError(
                f"window = {window!r}: a spread needs 2 losses or more, such as the default 35"
            )
        if not (isfinite(k_sigma) and k_sigma > 0):
            raise InputError(f"k_sigma = {k_sigma!r}: give a number above 0, such as 3")
        if not (isfinite(std_floor) and std_floor > 0):
            raise InputError(f"std_floor = {std_floor!r}: give nats above 0, such as 0.005")
        self.alpha, self.window, self.k_sigma, self.std_floor = alpha, window, k_sigma, std_floor
        self.losses: deque[float] = deque([] if start is None else [start], maxlen=window)
        self.smoothed: float | None = None
        self.settled: float | None = None
        self.threshold: float | None = None  # as it was last computed
        self.lowest: float | None = None  # of all thresholds

    def update(self, loss: float, trained: bool = True) -> bool:
        """Take a batch's loss before the step, and tell whether it alarms.

        `trained` says whether the model is trained on that batch; the window holds only those.
        Raises NonFiniteError for NaN or infinity and is then as it was.
        """
        self.see(loss)
        alarm = self.alarmed()
        if trained:
            self.take(loss)
        return alarm

    def see(self, loss: float) -> None:
        """Smooth a batch's loss. Raises NonFiniteError."""
        self.smoothed = self._with(self.smoothed, _finite(loss))

    def alarmed(self) -> bool:
        """Compute the threshold anew and return whether the smoothed loss is above it."""
        if not self.losses:
            return False
        mean = fsum(self.losses) / len(self.losses)
        std = sqrt(fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses))
        self.threshold = mean + self.k_sigma * max(std, self.std_floor)
        if self.lowest is None or self.threshold < self.lowest:
            self.lowest = self.threshold
        return self.smoothed is not None and self.smoothed > self.threshold

    def excess(self, loss: float) -> float:
        """Return how far a loss would lift `settled` above the last threshold, in nats."""
        if self.threshold is None:
            return float("inf")
        return self._with(self.settled, _finite(loss)) - self.threshold

    def take(self, loss: float) -> None:
        """Count the loss before a step that was trained. Raises NonFiniteError."""
        self.losses.append(_finite(loss))
        self.settled = self._with(self.settled, loss)

    def _with(self, before: float | None, loss: float) -> float:
        return loss if before is None else self.alpha * loss + (1 - self.alpha) * before

    def copy(self) -> "LossShiftDetector":
        """Return one in the same state that shares nothing."""
        out = object.__new__(LossShiftDetector)
        out.__dict__.update(self.__dict__, losses=self.losses.copy())
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the settings, as plain values."""
        names = ("smoothed", "settled", "threshold", "lowest")
        return {"losses": list(self.losses)} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of another one."""
        self.losses = deque(state["losses"], maxlen=self.window)
        for name in ("smoothed", "settled", "threshold", "lowest"):
            setattr(self, name, state[name])


class Decision(NamedTuple):
    """Who takes a batch, and why."""

    kind: Literal["same", "switch", "new"]
    expert: int
    before: int | None  # the expert before it; None for the first batch
    loss: float  # of `expert` on the batch, nats
    threshold: float  # that the smoothed loss of the expert before was held against
    smoothed: float  # that loss
    alarm: bool
    forced: bool  # no expert fitted, and there may be no more of them
    losses: dict[int, float]  # of every expert that was evaluated


class Switch:
    """Chooses the expert of each batch; experts are numbers, their losses come from a callable.

    `make` makes a detector for a new expert. With `most` experts, the one nearest to fitting takes
    over instead of a new one. `lazy` asks for losses of other experts on an alarm alone: their
    `smoothed` then misses the batches between.
    """

    def __init__(
        self, make: Callable[[], LossShiftDetector], most: int | None = None, lazy: bool = False
    ) -> None:
        self.make, self.most, self.lazy = make, most, lazy
        self.detectors: dict[int, LossShiftDetector] = {}  # in the order of their creation
        self.current: int | None = None
        self.made = 0

    def decide(self, loss_of: Callable[[int], float]) -> Decision:
        """Choose the expert of a batch; `take` then says that it was trained.

        `loss_of` gives an expert's loss, also of one that is new. Raises NonFiniteError for a loss
        that is none; whoever goes on after that keeps a `copy` from before.
        """
        before, made = self.current, self.made
        if before is None:
            self.current = self._added()
        current = self.detectors[self._now()]
        asked = [self._now()] if self.lazy else list(self.detectors)
        losses = {number: _finite(loss_of(number)) for number in asked}
        for number, loss in losses.items():
            self.detectors[number].see(loss)
        alarm, forced = current.alarmed(), False
        if alarm:
            for number in self.detectors:
                if number not in losses:
                    losses[number] = _finite(loss_of(number))
            excess = {n: found.excess(losses[n]) for n, found in self.detectors.items()}
            fitting = next((number for number, above in excess.items() if above < 0), None)
            if fitting is None and self.most is not None and len(excess) >= self.most:
                fitting, forced = min(excess, key=excess.__getitem__), True
            if fitting is None:
                fitting = self._added()
                losses[fitting] = _finite(loss_of(fitting))
            self.current = fitting
        chosen = self._now()
        kind = "same" if chosen == before else "new" if chosen >= made else "switch"
        assert current.threshold is not None
        assert current.smoothed is not None
        return Decision(
            kind,
            chosen,
            before,
            losses[chosen],
            current.threshold,
            current.smoothed,
            alarm,
            forced,
            losses,
        )

    def take(self, loss: float) -> None:
        """Count the loss before the step on which the current expert was trained."""
        self.detectors[self._now()].take(loss)

    def drop(self, number: int, into: int) -> None:
        """Forget an expert; if it is the current one another takes its place."""
        del self.detectors[number]
        if self.current == number:
            self.current = into

    def copy(self) -> "Switch":
        """Return one in the same state that shares none."""
        out = Switch(self.make, self.most, self.lazy)
        out.detectors = {number: found.copy() for number, found in self.detectors.items()}
        out.current, out.made = self.current, self.made
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the settings, as plain values."""
        found = {number: one.state_dict() for number, one in self.detectors.items()}
        return {"detectors": found, "current": self.current, "made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of another one."""
        detectors = {}
        for number, told in state["detectors"].items():
            detectors[number] = self.make()
            detectors[number].load_state_dict(told)
        self.detectors, self.current, self.made = detectors, state["current"], state["made"]

    def _added(self) -> int:
        self.detectors[self.made] = self.make()
        self.made += 1
        return self.made - 1

    def _now(self) -> int:
        assert self.current is not None
        return self.current


def _finite(loss: float) -> float:
    if not isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss}; it is not counted, as it would hide every shift. Lower the "
            "learning rate, or look for NaN in the batch"
        )
    return float(loss)

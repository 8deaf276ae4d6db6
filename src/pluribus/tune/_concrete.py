"""What `Concrete` does around its two loops: draws, the inner step, judging, telling how long."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError
from pluribus.tune._blend import Leaves
from pluribus.tune._fit import Log, OnStep, Problem
from pluribus.tune._mask import ConcreteMask, Draw
from pluribus.tune._streams import Batch, Streams
from pluribus.tune.concrete import FINALS, Concrete


class MaskStage:
    """What the first stage does around its loop: draws, the inner step, the logits' gradient."""

    def __init__(self, method: Concrete, problem: Problem, mask: ConcreteMask) -> None:
        self.method, self.problem, self.mask = method, problem, mask
        self.generator = Generator(mask.flat.device).manual_seed(method.seed)
        coefficients = problem.blend.coefficients
        self.start = coefficients.detach().clone()
        self.reached = self.start.clone()  # c' of the last step
        self.optimiser = torch.optim.Adam([coefficients], lr=method.inner_lr)
        self.draw: Draw
        self.batches: Sequence[Batch] = ()  # the last that the logits learned from

    def masks(self) -> dict[str, Tensor]:
        """Draw anew."""
        with torch.no_grad():
            self.draw = self.mask.draw(self.generator)
        return self.draw.masks

    def inner(self, leaves: Leaves, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Take one step of the coefficients on half of the batches, and merge there."""
        blend, half = self.problem.blend, len(batches) // 2
        terms = self.problem.backward(leaves, batches[:half])
        if not np.isfinite(list(terms.values())).all():
            return batches[:half]  # for the loop to meet the same loss, and say what is wrong
        blend.pull(leaves, self.draw.masks)
        self.optimiser.step()
        blend.refresh(leaves, self.masks() if self.method.redraw else self.draw.masks)
        return batches[half:]

    def gradient(self, leaves: Leaves, batches: Sequence[Batch]) -> None:
        """Give the logits their gradient, and put the coefficients back to their start."""
        blend = self.problem.blend
        self.batches = batches
        self.mask.pull(self.draw, blend.pull(leaves, self.draw.masks, mask_gradients=True))
        with torch.no_grad():
            self.reached.copy_(blend.coefficients)
            blend.coefficients.copy_(self.start)

    def compare(self, log: Log) -> None:
        """Note what the last batches' loss is with each final mask, and how much one drops."""
        blend, losses = self.problem.blend, []
        for kind in FINALS if self.batches and self.problem.wants != "guesses" else ():
            leaves = blend.leaves(self.mask.final(kind, self.method.seed))
            loss = sum(self.problem.losses(leaves, self.batches).values())
            losses.append(f"{kind} {loss:.4f}")
        if losses:
            log.notes.append(f"loss of the mask's last batches by final mask: {', '.join(losses)}")
        log.notes.append(f"a discrete mask drops {self.mask.sparsity():.1%} of the weights")


class Estimate:
    """Says how much is to do before it is done: passes at once, minutes after the second step."""

    def __init__(self, passes: int, steps: int, log: Log, on_step: OnStep | None) -> None:
        self.log, self.on_step, self.told = log, on_step, ""
        self.stage, self.begun = "", 0.0
        self.label = f"{passes:,} passes in all"
        log.notes.append(f"up to {passes:,} passes forward and backward")

    def announce(self, stage: str, steps: int) -> None:
        """Begin a stage."""
        self.stage, self.begun = stage, 0.0
        self.label = self.label if stage == "mask" else f"{steps:,} steps"
        if self.on_step is not None:
            self.on_step(f"{stage}: {self.label}", 0, steps)

    def __call__(self, stage: str, number: int, steps: int) -> None:
        """Pass a step on; the first one's time is not counted, it warms up."""
        now = time.perf_counter()
        if number == 1:
            self.begun = now
        elif number == 2:
            minutes = (now - self.begun) * steps / 60
            self.label = f"about {minutes:.1f} min"
        if self.on_step is not None:
            self.on_step(f"{stage}: {self.label}", number, steps)


def note_stage(log: Log, stage: str, began: int) -> None:
    """Note which steps a stage took, and which one it kept."""
    ended = len(log.steps)
    kept = f"; step {log.best} was kept" if log.best is not None and log.best >= began else ""
    log.notes.append(f"steps {began + 1} to {ended} learned the {stage}{kept}")


def judge_of(problem: Problem, kept: Mapping[str, list[Any]]) -> Callable[[Leaves], float]:
    """Return the objective on held-out batches, negated: greater is better.

    Raises InputError for an objective that learns from guesses, which change as it goes.
    """
    if problem.wants == "guesses":
        raise InputError(
            "an objective with guesses cannot judge a held-out part; give stop='agreement'"
        )
    labelled = problem.wants == "labels"
    held = Streams(kept, labelled=labelled, device=problem.blend.device)
    batches = [held.next(task) for task in kept for _ in kept[task]]

    def score(leaves: Leaves) -> float:
        total = sum(problem.losses(leaves, batches).values())
        return -total if np.isfinite(total) else -float("inf")

    return score

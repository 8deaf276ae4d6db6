"""Modes with known chances: what a probe decides, and after how many problems.

Both are right together on most problems: 8 % go one way and 8 % the other beside delta. Those that
are `independent` agree by chance alone.
"""

import random
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pluribus.claims import OnStep
from pluribus.decode.scaling.interface import Generator, Problem

if TYPE_CHECKING:
    from pluribus.agents.thinking import Attempt
    from pluribus.decode.scaling.budget import Budget

ALPHA = 0.05
DELTAS = (-0.2, -0.05, 0.0, 0.05, 0.2)
RUNS = 100  # simulated probes for each delta
MOST = 200  # problems of a probe
BESIDE = 0.08  # share of problems that go one way, and the other, beside delta


@dataclass(frozen=True)
class Fated:
    """A mode that is right where it is said to be."""

    name: str
    right: frozenset[str]  # problems, by id
    most_tokens: int | None = 1

    def run(
        self, problem: Problem, model: Generator | None, budget: "Budget | None" = None
    ) -> "Attempt":
        """See `Mode`."""
        from pluribus.agents.thinking import Attempt

        wrong = "No" if problem.answer == "Yes" else "Yes"
        return Attempt(problem.answer if problem.id in self.right else wrong, "", 1)


def fates(delta: float, rng: random.Random, *, independent: bool = False) -> tuple[bool, bool]:
    """Return whether the first and the second mode are right on a problem."""
    if independent:
        return rng.random() < 0.5, rng.random() < 0.5 + delta
    gain, loss = BESIDE + max(delta, 0.0), BESIDE + max(-delta, 0.0)
    same = (1 - gain - loss) / 2
    outcomes = ((False, True), (True, False), (True, True), (False, False))
    return rng.choices(outcomes, (gain, loss, same, same))[0]


def simulated(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return what probes of modes with known chances decide, and after how many problems."""
    out: dict[str, float] = {}
    ways = [(f"{delta:+g}", delta, False) for delta in DELTAS]
    for name, delta, independent in (*ways, ("independent", 0.2, True)):
        rng = random.Random(f"simulated/{seed}/{name}")
        told = []
        for number in range(RUNS):
            told.append(_probed(delta, rng, number, independent))
            if on_step is not None:
                on_step(f"probes at delta {name}", number + 1, RUNS)
        right = "undecided" if delta == 0 else "cot" if delta > 0 else "direct"
        worse = {"cot": "direct", "direct": "cot"}.get(right)
        out[f"{name}: wrong"] = 100 * fmean(decision != right for decision, _ in told)
        out[f"{name}: worse"] = 100 * fmean(decision == worse for decision, _ in told)
        out[f"{name}: problems"] = fmean(n for _, n in told)
    return out


def _probed(delta: float, rng: random.Random, number: int, independent: bool) -> tuple[str, int]:
    from pluribus.agents.thinking import CoTProbe, Task

    problems = [
        Problem(question=f"{i}", answer="Yes" if i % 2 else "No", id=f"{i}") for i in range(MOST)
    ]
    drawn = {one.id: fates(delta, rng, independent=independent) for one in problems}
    modes = [
        Fated(name, frozenset(key for key, both in drawn.items() if both[place]))
        for place, name in enumerate(("direct", "cot"))
    ]
    probe = CoTProbe(_Nobody(), modes, alpha=ALPHA, n_max=MOST, seed=number)
    effect = probe.measure(Task.of("simulated", problems))
    return effect.decision, effect.n


class _Nobody:
    """A model that is not asked."""

    def sample(self, *_: Any, **__: Any) -> list[Any]:
        raise AssertionError("modes with known chances ask no model")

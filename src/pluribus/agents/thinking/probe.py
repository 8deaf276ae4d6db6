"""Measures on a task which mode pays, with as few problems as that needs.

All modes that are still in the race answer the same problems, eight at a time. For each pair of
them a confidence sequence (see `sequential`) follows the net value of one over the other,

    U_i = value (c_i - d_i) - price (tokens of c on i - tokens of d on i)

at level alpha / tasks / pairs. A mode drops out once another is proven better. It ends when one is
left, or with the problems, n_max at most. Undecided, the first mode stays: the cheap default. If
the first has dropped out and several are left, the one with the best mean is chosen, of equals the
cheaper.
"""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

from pluribus.agents.thinking.effect import (
    UNDECIDED,
    UNREAD,
    Effect,
    arm,
    check_prices,
    compare,
)
from pluribus.agents.thinking.modes import Attempt, CoT, Direct, Mode, try_all
from pluribus.agents.thinking.sequential import ConfidenceSequence
from pluribus.agents.thinking.tasks import Task
from pluribus.core.errors import InputError
from pluribus.decode.scaling.budget import Budget
from pluribus.decode.scaling.interface import Generator, Problem

BATCH = 8
FEWEST = 20  # problems; fewer decide nothing
KEPT = 32  # questions kept with an effect

OnStep = Callable[[str, int, int], None]


class CoTProbe:
    """Measures modes of one model; the first is the default. `tasks` share alpha between them."""

    def __init__(
        self,
        model: Generator | None,
        modes: Sequence[Mode] = (),
        *,
        value: float = 1.0,
        price: float = 0.0,
        alpha: float = 0.05,
        n_max: int = 200,
        tasks: int = 1,
        budget: Budget | None = None,
        seed: int = 0,
    ) -> None:
        """`value` is what one right answer is worth, `price` what one token costs; the model may
        be given later, as the attribute `model`.

        Without modes they are `Direct()` and `CoT()`. Raises InputError for fewer than two modes,
        two of one name, a mode without a bound on its tokens where these have a price, n_max below
        20, or a number out of range.
        """
        check_prices(value, price)
        self.model, self.modes = model, tuple(modes) or (Direct(), CoT())
        names = [mode.name for mode in self.modes]
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(
                f"the modes are {', '.join(names)}; give two or more with names of their own"
            )
        if n_max < FEWEST:
            raise InputError(
                f"n_max is {n_max}, too few problems for any decision; give {FEWEST} or more"
            )
        if tasks < 1:
            raise InputError(f"tasks is {tasks}; give how many share alpha, 1 or more")
        if not 0 < alpha < 1:
            raise InputError(f"alpha is {alpha}; give a share between 0 and 1, such as 0.05")
        self.value, self.price, self.alpha = value, price, alpha
        self.n_max, self.tasks, self.budget, self.seed = n_max, tasks, budget, seed
        self._bounds = [self._bound(mode) for mode in self.modes]

    def measure(self, task: Task, told: OnStep | None = None) -> Effect:
        """Ask until it is decided, and return what was found.

        Raises InputError for a task of fewer than 20 problems, or a model that writes more than a
        mode's bound. Warns if over 20 % of a mode's texts hold no answer.
        """
        self.check([task])
        if self.model is None:
            raise InputError("the probe has no model; set its attribute `model`")
        model = self.model
        order = random.Random(f"{self.seed}/{task.name}").sample(task.problems, len(task.problems))
        problems = order[: self.n_max]
        pairs = list(combinations(range(len(self.modes)), 2))
        level = self.alpha / self.tasks / len(pairs)
        race = {pair: ConfidenceSequence(*self._range(*pair), level) for pair in pairs}
        attempts: list[list[Attempt]] = [[] for _ in self.modes]
        alive = list(range(len(self.modes)))
        done = 0
        while done < len(problems) and len(alive) > 1:
            batch = problems[done : done + BATCH]
            for k in alive:
                attempts[k] += try_all(self.modes[k], batch, model, self.budget)
            for (i, j), sequence in race.items():
                if i in alive and j in alive:
                    sequence.add(self._nets(attempts[i], attempts[j], problems, done, len(batch)))
            done += len(batch)
            alive = self._left(alive, race)
            if told is not None:
                told(task.name, done, len(problems))
        if told is not None and done < len(problems):
            told(task.name, len(problems), len(problems))
        return self._effect(task, problems[:done], attempts, alive, race)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise InputError for tasks that could not be measured, before a model is asked."""
        for task in tasks:
            if len(task.problems) < FEWEST:
                raise InputError(
                    f"{task.name} has {len(task.problems)} problems, too few for any decision; "
                    f"give {FEWEST} or more"
                )
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise InputError(f"the tasks are {', '.join(names)}; give each once")

    def _bound(self, mode: Mode) -> float:
        """Return the most that one attempt can cost."""
        if self.price == 0:
            return 0.0
        known = [one for one in (mode.most_tokens, self.budget and self.budget.tokens) if one]
        if not known:
            raise InputError(
                f"{mode.name} has no bound on its tokens, and they have a price; give it "
                "most_tokens, or the probe a Budget(tokens=...)"
            )
        return self.price * min(known)

    def _range(self, i: int, j: int) -> tuple[float, float]:
        """Return the least and the most net value of mode j over mode i on one problem."""
        return -self.value - self._bounds[j], self.value + self._bounds[i]

    def _nets(
        self,
        first: list[Attempt],
        second: list[Attempt],
        problems: list[Problem],
        start: int,
        count: int,
    ) -> list[float]:
        return [
            self._worth(second[k], problems[k]) - self._worth(first[k], problems[k])
            for k in range(start, start + count)
        ]

    def _worth(self, attempt: Attempt, problem: Problem) -> float:
        right = attempt.parsed and attempt.answer == problem.answer
        return self.value * right - self.price * attempt.tokens

    def _left(self, alive: list[int], race: dict[tuple[int, int], ConfidenceSequence]) -> list[int]:
        """Return the modes that no other one is proven better than."""
        beaten: set[int] = set()
        for (i, j), sequence in race.items():
            if i in alive and j in alive and (sign := sequence.sign()):
                beaten.add(i if sign > 0 else j)
        return [k for k in alive if k not in beaten] or alive[:1]

    def _effect(
        self,
        task: Task,
        problems: list[Problem],
        attempts: list[list[Attempt]],
        alive: list[int],
        race: dict[tuple[int, int], ConfidenceSequence],
    ) -> Effect:
        answers = [one.answer for one in problems]
        arms = tuple(
            arm(mode.name, own, answers[: len(own)])
            for mode, own in zip(self.modes, attempts, strict=True)
        )
        pairs = []
        for (i, j), sequence in race.items():
            n = len(sequence)
            pair = compare(
                attempts[i][:n],
                attempts[j][:n],
                answers[:n],
                value=self.value,
                price=self.price,
                names=(self.modes[i].name, self.modes[j].name),
                seed=self.seed,
            )
            pairs.append(replace(pair, net_ci=sequence.interval))
        notes = [
            f"{one.mode}: {one.unparsed} of {one.n} texts hold no answer that can be read; they "
            "count as wrong. `delta read` (delta_parsed) is without them; mend the format first"
            for one in arms
            if one.unparsed > UNREAD * one.n
        ]
        notes += [
            f"{mode.name} wrote {one.tokens:.0f} tokens a problem where {mode.max_tokens} were "
            "allowed: the model thinks unasked, or the endpoint takes no limit"
            for mode, one in zip(self.modes, arms, strict=True)
            if isinstance(mode, Direct) and one.tokens > mode.max_tokens
        ]
        for note in notes:
            warnings.warn(f"{task.name}: {note}", stacklevel=3)
        best = self._chosen(alive, attempts, problems)
        return Effect(
            task=task.name,
            n=len(problems),
            value=self.value,
            price=self.price,
            alpha=self.alpha / self.tasks,
            arms=arms,
            pairs=tuple(pairs),
            decision=self.modes[best].name if len(alive) == 1 else UNDECIDED,
            chosen=self.modes[best].name,
            notes=tuple(notes),
            traits=dict(task.traits),
            questions=tuple(one.question for one in task.problems[:KEPT]),
        )

    def _chosen(
        self, alive: list[int], attempts: list[list[Attempt]], problems: list[Problem]
    ) -> int:
        if 0 in alive:
            return 0

        def order(k: int) -> tuple[float, float]:
            n = len(attempts[k])
            worth = sum(self._worth(a, p) for a, p in zip(attempts[k], problems[:n], strict=True))
            return worth / n, -sum(a.tokens for a in attempts[k]) / n

        return max(alive, key=order)

"""How well models follow preferences: the paper's averages over random ones, and forgetting.

IBCL, https://arxiv.org/abs/2310.02995; code `visualize_results.py`. With P preferences, K models
each and k tasks,

    a[l]     = sum_p w[p, l] max|mean|min_K acc[p, :, l] / sum_p w[p, l]               (k,)
    average  = mean_l a[l],   peak = max_l a[l]
    weighted = mean_p sum_l w[p, l] mean_K acc[p, :, l]
    backward = mean_{l < k} acc_k[l] - acc_l[l]    (Lopez-Paz and Ranzato 2017, arXiv:1706.08840)

Differs from the authors' code, whose backward transfer compares neighbouring tasks at one time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError
from pluribus.core.shapes import Float
from pluribus.train.continual.preference import Preference, shares

Over = Literal["max", "mean", "min"]  # of the K models that answer one preference
Answer = Callable[[Preference], Sequence[Mapping[str, Tensor]]]
Score = Callable[[Mapping[str, Tensor], Any], float]


@dataclass(frozen=True, eq=False)
class AccuracyTable:
    """Accuracies from 0 to 1 of the models that answer preferences, on every task."""

    tasks: tuple[str, ...]
    preferences: Float[Tensor, "p k"]
    accuracy: Float[Tensor, "p m k"]  # m models a preference

    def per_task(self, over: Over = "mean") -> Float[Tensor, " k"]:
        """Return each task's accuracy, preferences counting as much as they want the task.

        NaN for a task that no preference wants.
        """
        chosen = {"max": torch.amax, "mean": torch.mean, "min": torch.amin}[over]
        found = chosen(self.accuracy, dim=1)
        return (self.preferences * found).sum(0) / self.preferences.sum(0)

    def average(self, over: Over = "mean") -> float:
        """Return the mean of `per_task`, over tasks that some preference wants."""
        return float(self.per_task(over).nanmean())

    def peak(self, over: Over = "mean") -> float:
        """Return the greatest of `per_task`."""
        found = self.per_task(over)
        return float(found[~found.isnan()].max())

    def weighted(self) -> float:
        """Return the mean over preferences of the accuracy that each would count."""
        return float((self.preferences * self.accuracy.mean(1)).sum(1).mean())

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row a preference: shares, mean accuracies, and the weighted one."""
        means = self.accuracy.mean(1)
        return [
            {
                "preference": dict(zip(self.tasks, wanted.tolist(), strict=True)),
                "accuracy": dict(zip(self.tasks, got.tolist(), strict=True)),
                "weighted": float((wanted * got).sum()),
            }
            for wanted, got in zip(self.preferences, means, strict=True)
        ]

    def text(self) -> str:
        """Return a table for a terminal: the shares, then the accuracies, in percent."""
        from pluribus.report import aligned

        header = [f"w {task}" for task in self.tasks] + list(self.tasks) + ["weighted"]
        rows = [
            [
                *(100 * value for value in row["preference"].values()),
                *(100 * value for value in row["accuracy"].values()),
                100 * row["weighted"],
            ]
            for row in self.rows()
        ]
        return aligned(header, rows, dict.fromkeys(header, ".1f"))


def drawn(tasks: Sequence[str], count: int, generator: Generator) -> list[dict[str, float]]:
    """Return random preferences: uniform numbers divided by their sum, as the authors' code draws.

    Raises InputError for fewer than one.
    """
    if count < 1:
        raise InputError(f"{count} preferences: ask for at least 1")
    out = []
    for row in torch.rand(count, len(tasks), generator=generator, dtype=torch.float64):
        parts = shares(dict(zip(tasks, row.tolist(), strict=True)), tasks, normalise=True)
        out.append(dict(zip(tasks, parts, strict=True)))
    return out


def measure(
    answer: Answer, preferences: Iterable[Preference], data: Mapping[str, Any], score: Score
) -> AccuracyTable:
    """Return the accuracies of the models that `answer` gives to each preference.

    `data` is one entry a task, `score(state, entry)` its accuracy from 0 to 1. Raises InputError
    for no preferences, or one outside the simplex.
    """
    tasks = tuple(data)
    wanted, got = [], []
    for preference in preferences:
        wanted.append(shares(preference, tasks))
        got.append([[score(state, data[task]) for task in tasks] for state in answer(preference)])
    if not wanted:
        raise InputError("no preferences were given; ask for at least one")
    return AccuracyTable(
        tasks, torch.tensor(wanted, dtype=torch.float64), torch.tensor(got, dtype=torch.float64)
    )


def backward_transfer(accuracy: Float[Tensor, "k k"]) -> float:
    """Return the mean change of earlier tasks' accuracies since they were learned.

    `accuracy[i, l]` is that on task l after task i. Raises InputError for fewer than two tasks.
    """
    count = len(accuracy)
    if count < 2:
        raise InputError("backward transfer compares with earlier tasks: give two or more")
    return float((accuracy[-1] - accuracy.diagonal())[:-1].mean())

"""Scores of predictions: accuracy, Matthews correlation, exact match after extraction.

    accuracy, exact match   c / n, with c of n right; standard error sqrt(p (1 - p) / n)
    Matthews                (TP TN - FP FN) / sqrt((TP+FP) (TP+FN) (TN+FP) (TN+FN)), 0 where the
                            denominator is; standard error: of 1000 resamplings of the rows

Exact match takes an answer out of what a model wrote before it compares: see `last_number` and
`short_answer`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from pluribus.core.shapes import Float

RESAMPLINGS = 1000
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
OPTION = re.compile(r"\(([A-Za-z])\)")
LEAD = re.compile(r"(?i)^.*\b(?:the|my|final) answer(?: is|:)\s*:?\s*")


@dataclass(frozen=True)
class Scorer:
    """A metric. `right` judges one row; without it, `whole` scores all rows together."""

    metric: str
    right: Callable[[Any, Any], bool] | None = None
    whole: Callable[[Float[np.ndarray, " b"], Float[np.ndarray, " b"]], float] | None = None

    def __call__(self, predictions: Sequence[Any], targets: Sequence[Any]) -> float:
        """Return the score of one or more rows."""
        if self.right is not None:
            hits = [self.right(p, t) for p, t in zip(predictions, targets, strict=True)]
            return sum(hits) / len(hits)
        assert self.whole is not None
        return self.whole(np.asarray(predictions, float), np.asarray(targets, float))

    def standard_error(
        self, predictions: Sequence[Any], targets: Sequence[Any], seed: int
    ) -> float:
        """Return the standard error of the score over samples of as many rows."""
        if self.right is not None:
            p = self(predictions, targets)
            return (p * (1 - p) / len(targets)) ** 0.5
        assert self.whole is not None
        rng = np.random.default_rng([seed, len(targets)])
        told, true = np.asarray(predictions, float), np.asarray(targets, float)
        draws = rng.integers(len(true), size=(RESAMPLINGS, len(true)))
        return float(np.std([self.whole(told[rows], true[rows]) for rows in draws], ddof=1))


def matthews(predicted: Float[np.ndarray, " b"], target: Float[np.ndarray, " b"]) -> float:
    """Return the Matthews correlation of two classes, 0 and 1."""
    tp, tn = ((predicted == k) & (target == k) for k in (1, 0))
    fp, fn = ((predicted == k) & (target != k) for k in (1, 0))
    a, b, c, d = (float(np.sum(cells)) for cells in (tp, tn, fp, fn))
    below = ((a + c) * (a + d) * (b + c) * (b + d)) ** 0.5
    return (a * b - c * d) / below if below else 0.0


def last_number(text: str) -> Decimal | None:
    """Return the number after the first `####`, else the last one; `$` and commas don't count."""
    _, marked, after = text.partition("####")
    found = NUMBER.findall(after if marked else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if marked else found[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def same_number(written: str, target: str) -> bool:
    """Return whether the number that an answer ends in equals the target."""
    found = last_number(written)
    return found is not None and found == last_number(target)


def short_answer(text: str) -> str:
    """Return the first line that says something, without `the answer is`, full stop and quotes."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return LEAD.sub("", line).strip().rstrip(".").strip("\"'` ")


def same_answer(written: str, target: str) -> bool:
    """Return whether a short answer is the target, but for case and spaces.

    For a target such as (B) the first letter in brackets counts, or a bare letter.
    """
    answer = short_answer(written)
    if OPTION.fullmatch(target):
        marked = OPTION.search(answer)
        bare = re.match(r"([A-Za-z])(?:[).:]|\s|$)", answer)
        letter = marked or bare
        return letter is not None and letter.group(1).upper() == target[1].upper()
    return answer.lower().split() == target.strip().rstrip(".").lower().split()


def _equal(predicted: Any, target: Any) -> bool:
    return predicted == target


ACCURACY = Scorer("accuracy", _equal)
MATTHEWS = Scorer("matthews", whole=matthews)
NUMERIC = Scorer("exact match (number)", same_number)
EXACT = Scorer("exact match", same_answer)

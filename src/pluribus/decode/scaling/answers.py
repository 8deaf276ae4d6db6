"""Answers: taken out of texts, and chosen among.

    majority    argmax_a |{i : ans_i = a}|
    weighted    argmax_a sum_{i : ans_i = a} w_i
    best        argmax_i w_i, the lowest i of equals

A None (no answer found) never wins a vote unless all are None. The first seen of equals wins, or
one of them by chance, if a `random.Random` is given.

Aggregates of step scores change rankings: `prod` punishes long answers, `min` one weak step, `last`
sees the whole text and is the default.
"""

import math
import random
import re
from collections.abc import Callable, Sequence

from pluribus.core.errors import InputError, nearest

Extract = Callable[[str], str | None]
MARK = re.compile(r"(?i)\b(?:final )?answer(?: is|:)\s*:?\s*")
BOXED = "\\boxed{"


def boxed(text: str) -> str | None:
    r"""Return what stands in the last \boxed{...}, with its braces in balance."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(BOXED)
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return _canonical(text[begin:at])
    return None


def final(text: str) -> str | None:
    """Return what follows the last `####`, `\\boxed{`, or `answer is`; else the last line."""
    if (found := boxed(text)) is not None:
        return found
    if "####" in text:
        return _canonical(text.rpartition("####")[2].strip().partition("\n")[0])
    if marks := list(MARK.finditer(text)):
        return _canonical(text[marks[-1].end() :].partition("\n")[0])
    return line(text)


def line(text: str) -> str | None:
    """Return the last line that says something."""
    lines = [one for one in text.splitlines() if one.strip()]
    return _canonical(lines[-1]) if lines else None


def first_line(text: str) -> str | None:
    """Return the first line that says something."""
    lines = [one for one in text.splitlines() if one.strip()]
    return _canonical(lines[0]) if lines else None


def number(text: str) -> str | None:
    """Return the last number, written in one way: 1,200.0 is 1200."""
    from pluribus.tasks.scorers import last_number

    found = last_number(text)
    if found is None:
        return None
    shown = f"{found.normalize():f}"
    return "0" if shown in ("-0", "0") else shown


def whole(text: str) -> str | None:
    """Return the text without space around it."""
    return text.strip() or None


EXTRACTORS: dict[str, Extract] = {
    "final": final,
    "number": number,
    "boxed": boxed,
    "line": line,
    "first_line": first_line,
    "text": whole,
}


def extractor(name: str) -> Extract:
    """Return the extractor called `name`. Raises InputError with the nearest name."""
    if name not in EXTRACTORS:
        raise InputError(
            f"no way to find answers is called {name!r}; there are {', '.join(EXTRACTORS)}."
            + nearest(name, EXTRACTORS)
        )
    return EXTRACTORS[name]


def _canonical(text: str) -> str | None:
    return text.strip().strip("$").strip().rstrip(".").strip() or None


def split(text: str, separator: str) -> list[str]:
    """Return the steps of a text, each with the separator that ended it; the last may have none.

    Raises InputError for an empty separator.
    """
    check_separator(separator)
    parts = text.split(separator)
    steps = [part + separator for part in parts[:-1]]
    return [*steps, parts[-1]] if parts[-1] else steps


def check_separator(separator: str) -> None:
    """Raise InputError for an empty separator."""
    if not separator:
        raise InputError(
            "the separator of steps is empty; give the text that ends a step, such as a blank line"
        )


def aggregate(scores: Sequence[float], how: str = "last") -> float:
    """Return one score of those of the steps. Raises InputError without any, or for another how."""
    if not scores:
        raise InputError("a candidate has no scores to aggregate; verifiers give at least one")
    if how == "last":
        return scores[-1]
    if how == "min":
        return min(scores)
    if how == "prod":
        return math.prod(scores)
    raise InputError(f"scores aggregate by last, min or prod, not {how!r}")


def weighted(
    answers: Sequence[str | None],
    weights: Sequence[float],
    chance: random.Random | None = None,
) -> str | None:
    """Return the answer with the largest sum of weights; None only if all are None."""
    sums: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    if not sums:
        return None
    most = max(sums.values())
    equal = [answer for answer, total in sums.items() if total == most]
    return equal[0] if chance is None else chance.choice(equal)


def majority(answers: Sequence[str | None], chance: random.Random | None = None) -> str | None:
    """Return the answer most often given; None only if all are None."""
    return weighted(answers, [1.0] * len(answers), chance)


def best(scores: Sequence[float]) -> int:
    """Return the index of the highest score, the lowest of equals."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def sure(first: int, second: int) -> float:
    """Return P(p1 > p2) for the two answers given most often, `first` >= `second` times.

    I_{1/2}(second + 1, first + 1), the regularised incomplete beta function; for whole numbers that
    is the chance of more than `second` heads in first + second + 1 throws of a coin. Adaptive
    consistency, Aggarwal et al. 2023, https://arxiv.org/abs/2305.11860.
    """
    throws = first + second + 1
    return sum(math.comb(throws, heads) for heads in range(second + 1, throws + 1)) / 2**throws

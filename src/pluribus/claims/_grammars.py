"""What can be learned from fifteen strings of a grammar: by their bigrams, and by a stated rule.

    score of a string = min + mean over its bigrams of log(count + 0.3), ends of strings included

A string is called grammatical above the median score of its grammar's tests. A stated rule looks at
one thing: the first letter was seen first, the last was seen last, all letters were seen.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from statistics import fmean, median

from pluribus.tasks.suites import Item, make
from pluribus.tasks.suites.grammar import Grammar

TESTS = 44  # strings judged for each grammar
GRAMMARS = 100
SMOOTH = 0.3


def figures(seed: int) -> dict[str, float]:
    """Return percentages: both ways of judging, and what must be right about the items."""
    bigrams, rules, off, seen = [], [], [], 0
    for own in _by_grammar(make(Grammar(tests=TESTS), TESTS * GRAMMARS, seed)):
        shown = own[0].meta["train"]
        texts = [one.meta["test"] for one in own]
        right = [one.answer == "Yes" for one in own]
        bigrams.append(_share(by_bigrams(shown, texts), right))
        rules.append(max(_share(told, right) for told in by_rules(shown, texts)))
        off.append(abs(fmean(right) - 0.5))
        seen += len(set(texts) & set(shown))
    return {
        "grammar: bigrams": 100 * fmean(bigrams),
        "grammar: best rule": 100 * fmean(rules),
        "grammar: labels off balance": 100 * max(off),
        "grammar: tests that were shown": float(seen),
    }


def by_bigrams(shown: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """Return which strings score above the median, by the bigrams of those shown."""
    counts = Counter(pair for text in shown for pair in pairwise(f"^{text}$"))
    scores = []
    for text in texts:
        logs = [math.log(counts[pair] + SMOOTH) for pair in pairwise(f"^{text}$")]
        scores.append(min(logs) + fmean(logs))
    middle = median(scores)
    return [score > middle for score in scores]


def by_rules(shown: Sequence[str], texts: Sequence[str]) -> Iterator[list[bool]]:
    """Yield what each stated rule says of the strings."""
    first, last = {text[0] for text in shown}, {text[-1] for text in shown}
    letters = set("".join(shown))
    yield [text[0] in first for text in texts]
    yield [text[-1] in last for text in texts]
    yield [set(text) <= letters for text in texts]


def _share(told: Sequence[bool], right: Sequence[bool]) -> float:
    return fmean(a == b for a, b in zip(told, right, strict=True))


def _by_grammar(items: Sequence[Item]) -> Iterator[list[Item]]:
    for _, own in groupby(items, key=lambda one: one.meta["train"]):
        yield list(own)

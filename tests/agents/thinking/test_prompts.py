"""Prompts are picked by what they get right, on problems that are not measured on."""

import sys
from pathlib import Path

import pytest

from pluribus.agents import Scripted
from pluribus.agents.thinking import CoT, halves, pick
from pluribus.core.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))  # tests have no package
from worlds import task  # type: ignore[import-not-found]

GOOD, LONG, BAD = "{question} Well?", "{question} At length?", "{question} Quick!"


def model(found):
    by = {one.question: one.answer for one in found.problems}

    def say(asked):
        question, _, rest = asked.prompt.partition("] ")
        if rest == "Quick!":
            return "Answer: Perhaps"
        right = f"Answer: {by[question + ']']}"
        return f"{'hm ' * 9}{right}" if rest == "At length?" else right

    return Scripted(say)


def test_halves_share_nothing():
    found = task(["rr"], n=41)
    first, second = halves(found)
    assert (len(first.problems), len(second.problems)) == (21, 20)
    ids = {one.id for one in first.problems} | {one.id for one in second.problems}
    assert len(ids) == 41
    assert halves(found) == (first, second) != halves(found, seed=1)
    assert first.name == second.name == "toy"


def test_the_most_accurate_then_the_cheapest():
    found = task(["rr"], n=20)
    assert pick(CoT(), [BAD, LONG, GOOD], model(found), found) == CoT(template=GOOD)
    assert pick(CoT(max_tokens=50), [BAD, LONG], model(found), found).template == LONG
    assert pick(CoT(), [GOOD, "{question} Well?"], model(found), found).template == GOOD


def test_refused():
    found, silent = task(["rr"], n=20), Scripted([])
    with pytest.raises(InputError, match="no template to pick from"):
        pick(CoT(), [], silent, found)
    with pytest.raises(InputError, match=r"it needs {question}"):
        pick(CoT(), [GOOD, "Well?"], silent, found)
    assert silent.asked == []

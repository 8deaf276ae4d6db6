"""Models that know their chances: a question tells which modes get it right."""

import re

from pluribus.agents import Scripted
from pluribus.agents.thinking import Task
from pluribus.agents.thinking.modes import choice
from pluribus.decode.scaling.interface import Problem

DIRECT, COT = "without reasoning", "step by step"


def task(pattern, name="toy", n=200, traits=None):
    """Problems whose questions say what direct and cot make of them, in turn: r, w or n(othing)."""
    problems = [
        Problem(
            question=f"Item {i} of {name} [{pattern[i % len(pattern)]}]",
            answer="Yes" if i // len(pattern) % 2 else "No",
            id=str(i),
            extract=choice(("Yes", "No")),
        )
        for i in range(n)
    ]
    return Task.of(name, problems, traits)


def knowing(found, thought=20):
    """Answers as the question says; direct in two words, cot after so many words of thought."""
    by = {one.question: one.answer for one in found.problems}

    def say(asked):
        question, _, rest = asked.prompt.partition("\n\n")
        told = re.search(r"\[(\w)(\w)\]", question)
        thinks = COT in rest
        fate = told.group(2 if thinks else 1)
        right = by[question]
        wrong = "Yes" if right == "No" else "No"
        said = {"r": f"Answer: {right}", "w": f"Answer: {wrong}", "n": "Hard to"}[fate]
        return f"{'hm ' * (thought - 2)}{said}" if thinks else said

    return Scripted(say)

"""Game of 24: a search with an exact value finds what samples of the same proposer miss.

Four numbers from 1 to 13 are to make 24, each used once, by + - * /; all 1,362 sets that can are
enumerated. A transformer over characters learns from legal steps drawn at random, so it knows how
to compute, and not where to go:

    4 9 10 13                   ->  13-9=4;4 4 10   a step, and the numbers that are left
    4 9 10 13, 13-9=4;4 4 10    ->  10-4=6;4 6

Its steps make whole numbers, none below 0. Tree of thoughts (breadth first, 20 samples a state)
values a state by whether 24 can still be made of it, in fractions, and keeps one: as the value does
not err, more add little; the authors' five are reported. The samples it is compared with are chains
of three steps, at least as many steps in all as the search has drawn, and a set counts as solved if
any chain solves it, so nothing is lost by choosing. A call is a step on both sides.

Sizes were chosen on seed 100, which no figure is of: with 5 samples a state, there is often none
that is right among those of the root, and the search is 13 points ahead (five kept) to 20 (one).
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import TYPE_CHECKING, Any

from pluribus.claims import Check, Claim, OnStep, _chars
from pluribus.claims._chars import Pair
from pluribus.decode.scaling.interface import Completion, Problem, Sampling
from pluribus.tasks.specialise import threads

if TYPE_CHECKING:
    from pluribus.agents import LocalModel

GOAL, LARGEST, NUMBERS = 24, 13, 4
STEPS_OF_ONE = NUMBERS - 1
LETTERS = "0123456789+-*/=;> \n"
TEMPLATE = "{question}\n>{thoughts}\n"
POSITIONS = 128
WIDTH, LAYERS = 96, 3
ROWS, RATE, STEPS = 64, 2e-3, 3000
TESTS = 100
K, KEPT = 20, 5  # samples of a state, and states that the larger search keeps
DRAWN = Sampling(temperature=1.0, max_tokens=28)

CLAIM = Claim(
    name="game-of-24",
    title="A search that values states finds what samples of the same proposer miss",
    paper="arXiv:2305.10601",
    data="100 of the 1,362 sets of four numbers from 1 to 13 that make 24",
    model="a Llama over characters, 3 layers of width 96 (0.3 M), trained on random legal steps",
    metric="percent of sets that are solved",
    checks=(
        Check(text="first steps that are legal (the premise)", left="legal steps", margin=80.0),
        Check(
            text="tree of thoughts over chains of as many steps, any of which may be right",
            left="tree",
            right="chains at the tree's calls",
            margin=30.0,
        ),
        Check(
            text="calls of those chains over the tree's",
            left="chains' calls",
            right="tree calls",
            each=True,
        ),
        Check(
            text="tree of thoughts that keeps five states, over chains of as many steps",
            left="tree of five",
            right="chains at the calls of five",
            margin=30.0,
            asserted=False,
        ),
        Check(
            text="tree of thoughts that keeps five states, over the one that keeps one",
            left="tree of five",
            right="tree",
            asserted=False,
        ),
    ),
)

Numbers = tuple[Fraction, ...]


@cache
def makes(left: Numbers) -> bool:
    """Whether 24 can be made of the numbers, given in order of size, by any steps."""
    if len(left) == 1:
        return left[0] == GOAL
    for i, j in combinations(range(len(left)), 2):
        rest = [number for place, number in enumerate(left) if place not in (i, j)]
        a, b = left[i], left[j]
        found = {a + b, a - b, b - a, a * b}
        found |= {x / y for x, y in ((a, b), (b, a)) if y}
        if any(makes(tuple(sorted([*rest, made]))) for made in found):
            return True
    return False


@cache
def puzzles() -> list[tuple[int, ...]]:
    """Return all sets of four numbers from 1 to 13, in order, that make 24."""
    every = combinations_with_replacement(range(1, LARGEST + 1), NUMBERS)
    return [numbers for numbers in every if makes(tuple(map(Fraction, numbers)))]


def moves(left: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the steps that may be taken, with what is left: whole numbers, none below 0."""
    found = []
    for i, j in combinations(range(len(left)), 2):
        rest = [number for place, number in enumerate(left) if place not in (i, j)]
        b, a = sorted((left[i], left[j]))
        made = [(f"{a}+{b}", a + b), (f"{a}-{b}", a - b), (f"{a}*{b}", a * b)]
        if b and a % b == 0:
            made.append((f"{a}/{b}", a // b))
        found += [(f"{said}={value}", tuple(sorted([*rest, value]))) for said, value in made]
    return found


def step_of(said: str, left: Sequence[int]) -> str:
    """Return a step as it is written."""
    return f"{said};{' '.join(map(str, left))}"


def after(question: str, steps: Sequence[str]) -> tuple[int, ...] | None:
    """Return what is left after the steps; None if one of them is not legal."""
    left = tuple(sorted(int(number) for number in question.split()))
    for step in steps:
        legal = {step_of(said, more): more for said, more in moves(left)} if len(left) > 1 else {}
        if step not in legal:
            return None
        left = legal[step]
    return left


@dataclass(frozen=True)
class Value:
    """1 for legal steps from which 24 can still be made, else 0."""

    def score(self, problem: Problem, candidate: list[str]) -> list[float]:
        """Return one score."""
        left = after(problem.question, _lines("\n".join(candidate)))
        return [float(left is not None and makes(tuple(map(Fraction, left))))]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def problem_of(numbers: Sequence[int]) -> Problem:
    """Return the question; its answer is 24, found in three legal steps that end there."""
    question = " ".join(map(str, numbers))

    def extract(text: str) -> str | None:
        left = after(question, _lines(text))
        return str(left[0]) if left is not None and len(left) == 1 else None

    return Problem(question=question, answer=str(GOAL), id=question, extract=extract)


def asked(question: str, steps: Sequence[str]) -> str:
    """Return what the proposer is asked for the next step."""
    return TEMPLATE.format(question=question, thoughts="\n".join(steps))


def drawn(rng: random.Random) -> Pair:
    """Return a state that random steps from random numbers lead to, and one step more."""
    left = tuple(sorted(rng.randint(1, LARGEST) for _ in range(NUMBERS)))
    question, steps = " ".join(map(str, left)), []
    for _ in range(rng.randrange(STEPS_OF_ONE) + 1):
        said, left = rng.choice(moves(left))
        steps.append(step_of(said, left))
    return Pair(asked(question, steps[:-1]), steps[-1])


class Chains:
    """Three steps of a proposer one after another, as one completion: what sampling does."""

    def __init__(self, model: "LocalModel") -> None:
        self.model = model

    def sample_many(
        self, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
    ) -> list[Completion]:
        """Return a chain for each question."""
        steps: list[list[str]] = [[] for _ in prompts]
        tokens = [0] * len(prompts)
        for number in range(STEPS_OF_ONE):
            states = [asked(question, own) for question, own in zip(prompts, steps, strict=True)]
            own_seeds = [STEPS_OF_ONE * seed + number for seed in seeds]
            for row, made in enumerate(self.model.sample_many(states, own_seeds, **settings)):
                steps[row] += _lines(made.text)[:1]
                tokens[row] += made.tokens
        return [Completion("\n".join(o), n) for o, n in zip(steps, tokens, strict=True)]


def measure(seed: int, on_step: OnStep | None = None) -> Mapping[str, float]:
    """Return all figures for one seed."""
    with threads(1):
        rng = random.Random(f"24/{seed}")
        tests = [problem_of(numbers) for numbers in rng.sample(puzzles(), TESTS)]
        return compared(proposer(seed, on_step), tests, seed, on_step)


def proposer(seed: int, on_step: OnStep | None = None) -> "LocalModel":
    """Return a model that was trained on random steps."""
    from pluribus.agents import LocalModel
    from pluribus.decode.stack import Opened

    words = _chars.tokenizer(LETTERS)
    model = _chars.untrained(seed, words, WIDTH, LAYERS, POSITIONS)
    rng = random.Random(f"24/{seed}/training")
    told: dict[str, Any] = {"on_step": on_step, "told": "training on steps"}
    _chars.train(model, words, drawn, rng, steps=STEPS, rows=ROWS, rate=RATE, **told)
    return LocalModel(Opened(model, words), chat="no")


def compared(
    model: "LocalModel", tests: list[Problem], seed: int, on_step: OnStep | None = None
) -> dict[str, float]:
    """Return what searches and chains solve, in percent, and their calls."""
    from pluribus.decode.scaling import TreeOfThoughts
    from pluribus.decode.scaling.curves import live, passes
    from pluribus.decode.scaling.pool import Pool

    settings = replace(DRAWN, seed=100_000 + seed)
    searches = {
        name: TreeOfThoughts(
            levels=STEPS_OF_ONE,
            keep=keep,
            generate="sample",
            k=K,
            evaluate="verifier",
            thought=TEMPLATE,
            sampling=settings,
        )
        for name, keep in (("tree", 1), ("tree of five", KEPT))
    }
    points = live(searches, tests, model, Value(), told=on_step)
    most = math.ceil(max(point.calls for point in points) / STEPS_OF_ONE)
    pool = Pool(replace(DRAWN, seed=200_000 + seed))
    pool.fill(tests, Chains(model), most, batch=max(128, 2 * most), told=on_step)  # type: ignore[arg-type]
    out: dict[str, float] = {}
    for point, name in zip(points, ("the tree's calls", "the calls of five"), strict=True):
        count = math.ceil(point.calls / STEPS_OF_ONE)
        out[point.strategy] = 100 * point.accuracy
        out[f"{point.strategy} calls"] = point.calls
        out[f"chains at {name}"] = 100 * passes(tests, pool, [count])[count]
        out.setdefault("chains' calls", float(STEPS_OF_ONE * count))
    first = [
        after(problem.question, _lines(made.text)[:1]) is not None
        for problem in tests
        for made in pool.samples(problem)
    ]
    out["legal steps"] = 100 * sum(first) / len(first)
    out["chains@1"] = 100 * passes(tests, pool, [1])[1]
    return out

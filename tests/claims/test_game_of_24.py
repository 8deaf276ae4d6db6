"""The claim `game-of-24` at toy size: its sets, its steps, its values, and what its figures are."""

import itertools
import math
import random
from fractions import Fraction

import pytest

pytest.importorskip("transformers")

from pluribus.agents import LocalModel, Scripted
from pluribus.claims import Outcome, _chars
from pluribus.claims import game_of_24 as claim
from pluribus.decode.scaling import Sampling
from pluribus.decode.scaling.interface import Completion
from pluribus.decode.stack import Opened

SOLUTION = ["13-9=4;4 4 10", "10-4=6;4 6", "6*4=24;24"]


def by_hand(numbers):
    """Whether any of all orders, operators and five bracketings makes 24."""
    operators = [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: None if b == 0 else a / b,
    ]

    def of(f, a, b):
        return None if a is None or b is None else f(a, b)

    for a, b, c, d in itertools.permutations(map(Fraction, numbers)):
        for f, g, h in itertools.product(operators, repeat=3):
            found = (
                of(h, of(g, of(f, a, b), c), d),
                of(h, of(f, a, of(g, b, c)), d),
                of(g, of(f, a, b), of(h, c, d)),
                of(f, a, of(h, of(g, b, c), d)),
                of(f, a, of(g, b, of(h, c, d))),
            )
            if 24 in found:
                return True
    return False


def test_the_sets_are_those_of_the_game():
    sets = claim.puzzles()
    assert len(sets) == 1362
    assert (1, 1, 1, 8) in sets
    assert (3, 3, 8, 8) in sets  # by fractions alone
    assert (1, 1, 1, 1) not in sets
    every = list(itertools.combinations_with_replacement(range(1, 14), 4))
    for numbers in random.Random(0).sample(every, 40):
        assert (numbers in sets) == by_hand(numbers)


def test_moves_of_two_numbers():
    assert claim.moves((4, 6)) == [("6+4=10", (10,)), ("6-4=2", (2,)), ("6*4=24", (24,))]
    assert ("6/3=2", (2,)) in claim.moves((3, 6))
    assert all(left == tuple(sorted(left)) for _, left in claim.moves((1, 5, 9, 13)))
    assert ("5/0=0", (0,)) not in claim.moves((0, 5))


def test_steps_are_followed_and_judged():
    problem = claim.problem_of((4, 9, 10, 13))
    assert claim.after(problem.question, SOLUTION[:2]) == (4, 6)
    assert problem.find("\n".join(SOLUTION)) == problem.answer == "24"
    assert problem.find("\n".join(SOLUTION[:2])) is None
    for wrong in ("6*4=25;25", "6*4=24;24 ", "4*6=24;24", "9*4=36;36"):
        assert problem.find("\n".join([*SOLUTION[:2], wrong])) is None
    assert problem.find("\n".join([*SOLUTION, "24+0=24;24"])) is None


@pytest.mark.parametrize(
    ("steps", "value"),
    [
        ([], 1),
        (SOLUTION[:1], 1),
        (SOLUTION, 1),
        (["13*9=117;4 10 117"], 0),  # legal, and lost
        (["13-9=5;4 5 10"], 0),
        ([*SOLUTION[:2], "6+4=10;10"], 0),
    ],
)
def test_values_of_states(steps, value):
    assert claim.Value().score(claim.problem_of((4, 9, 10, 13)), steps) == [value]


def test_what_is_learned_is_legal_and_of_every_length():
    rng, lengths = random.Random(3), set()
    for _ in range(300):
        pair = claim.drawn(rng)
        question, steps = pair.asked.split("\n>")
        known = steps.split("\n")[:-1] if steps != "\n" else []
        lengths.add(len(known))
        assert claim.after(question, [*known, pair.written]) is not None
        assert claim.asked(question, known) == pair.asked
    assert lengths == {0, 1, 2}


def test_chains_ask_for_one_step_after_another():
    script = dict(zip(["", *SOLUTION], SOLUTION, strict=False))
    seen = []

    class Steps:
        def sample_many(self, prompts, seeds, **settings):
            seen.append((list(prompts), list(seeds), settings))
            last = [prompt.rstrip("\n").rpartition("\n")[2].lstrip(">") for prompt in prompts]
            return [Completion(script[step], 9) for step in last]

    made = claim.Chains(Steps()).sample_many(["4 9 10 13"] * 2, [5, 6], max_tokens=28)
    assert [one.text for one in made] == ["\n".join(SOLUTION)] * 2
    assert [one.tokens for one in made] == [27, 27]
    assert [seeds for _, seeds, _ in seen] == [[15, 18], [16, 19], [17, 20]]
    assert {str(settings) for _, _, settings in seen} == {"{'max_tokens': 28}"}


def test_a_search_beats_chains_where_steps_are_blind(monkeypatch):
    """A proposer that takes any legal step: all figures, against what they count."""
    monkeypatch.setattr(claim, "K", 3)
    monkeypatch.setattr(claim, "KEPT", 2)
    calls = []

    def step(prompt, seed):
        question, _, steps = prompt.partition("\n>")
        left = claim.after(question, claim._lines(steps))
        said, more = random.Random(f"{prompt}{seed}").choice(claim.moves(left))
        return claim.step_of(said, more)

    def write(asked):
        calls.append(asked.n)
        return [step(asked.prompt, asked.seed + i) for i in range(asked.n)]

    class Blind(Scripted):
        def sample_many(self, prompts, seeds, **settings):
            return [Completion(step(p, s), 1) for p, s in zip(prompts, seeds, strict=True)]

    tests = [claim.problem_of(numbers) for numbers in claim.puzzles()[::120]]
    out = claim.compared(Blind(write), tests, 0)
    assert out["legal steps"] == 100
    assert out["tree calls"] + out["tree of five calls"] == pytest.approx(sum(calls) / len(tests))
    assert out["tree of five calls"] <= 3 + 6 + 6
    assert out["chains' calls"] >= out["tree calls"] == 3 + 3 + 3
    assert out["tree of five"] >= out["tree"] > out["chains@1"]


def test_figures(monkeypatch):
    sizes = {"WIDTH": 32, "LAYERS": 1, "ROWS": 4, "STEPS": 2, "TESTS": 2, "K": 2, "KEPT": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(claim, name, value)
    monkeypatch.setattr(claim, "DRAWN", Sampling(max_tokens=4))
    figures = {name: [value] for name, value in dict(claim.measure(0)).items()}
    told = Outcome(claim.CLAIM, (0,), figures, 1.0).to_dict()
    assert len(told["checks"]) == len(claim.CLAIM.checks)
    assert all(math.isfinite(check["measured"]) for check in told["checks"])


def test_the_tokenizer_knows_every_state():
    words = _chars.tokenizer(claim.LETTERS)
    model = _chars.untrained(0, words, 32, 1, claim.POSITIONS)
    reader = LocalModel(Opened(model, words), chat="no")
    text = claim.asked("4 9 10 13", SOLUTION[:2])
    assert words.decode(words(text)["input_ids"]) == text
    assert len(text) + claim.DRAWN.max_tokens <= claim.POSITIONS
    made = reader.sample(text, max_tokens=3)
    assert made[0].tokens <= 3

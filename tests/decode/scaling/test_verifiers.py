"""Verifiers: answers compared, code run, votes and grades read, implied rewards."""

import math
import sys
import time
from pathlib import Path

import pytest

from pluribus.agents import Scripted
from pluribus.core.errors import InputError, RecipeError
from pluribus.decode.scaling import VERIFIERS, Problem, Sampling
from pluribus.decode.scaling.verifiers import facts
from pluribus.decode.scaling.verifiers.exact import Exact
from pluribus.decode.scaling.verifiers.judge import Judge
from pluribus.decode.scaling.verifiers.majority import Majority
from pluribus.decode.scaling.verifiers.unit_tests import UnitTests, code

SUM = Problem(question="Sum?", tests="assert add(2, 3) == 5", answer="5")


def test_the_registry():
    assert {"exact", "judge", "majority", "unit_tests", "implicit_reward"} <= set(VERIFIERS)
    assert facts(VERIFIERS["exact"]).needs == "answer"
    with pytest.raises(RecipeError, match="Did you mean 'judge'"):
        VERIFIERS["juge"]


def test_exact():
    assert Exact().score(SUM, ["2 + 3 is\n\n", "#### 5"]) == [1.0]
    assert Exact().score(SUM, ["#### 6"]) == [0.0]
    raising = Problem(question="q", answer="5", extract=lambda text: {}[text])
    assert Exact().score(raising, ["5"]) == [0.0]
    with pytest.raises(InputError, match="has no answer to compare"):
        Exact().score(Problem(question="q"), ["5"])


# -- unit tests ------------------------------------------------------------------------------------

RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (RIGHT, 1.0),
        (f"Here it is:\n```python\n{RIGHT}```\nDone.", 1.0),
        (f"```python\nnonsense(\n```\nBetter:\n```\n{RIGHT}```", 1.0),
        ("def add(a, b):\n    return a - b\n", 0.0),
        ("def add(a, b) return", 0.0),
        (f"{RIGHT}raise SystemExit(0)", 0.0),
        (f"{RIGHT}import os\nos._exit(0)", 0.0),
        ("", 0.0),
    ],
    ids=["right", "fenced", "last block", "wrong", "no code", "leaves", "dies", "empty"],
)
def test_code_is_run(text, score):
    assert UnitTests().score(SUM, [text]) == [score]


def test_a_test_runner_may_end_with_exit():
    tests = (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(add(2, 3), 5)\nunittest.main()"
    )
    assert UnitTests().score(Problem(question="q", tests=tests), [RIGHT]) == [1.0]
    wrong = RIGHT.replace("+", "*")
    assert UnitTests().score(Problem(question="q", tests=tests), [wrong]) == [0.0]


def test_code_that_does_not_end_is_ended():
    assert UnitTests(seconds=0.5).score(SUM, [f"{RIGHT}while True: pass"]) == [0.0]


def test_what_it_started_ends_with_it(tmp_path):
    mark = tmp_path / "child"
    text = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
    )
    assert UnitTests(seconds=60).score(SUM, [text]) == [0.0]
    stat, deadline = Path(f"/proc/{mark.read_text()}/stat"), time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_is_limited():
    assert UnitTests(memory=1 << 29).score(SUM, [f"{RIGHT}x = bytearray(1 << 27)"]) == [1.0]
    assert UnitTests(memory=1 << 29).score(SUM, [f"{RIGHT}x = bytearray(1 << 30)"]) == [0.0]
    assert UnitTests(memory=0).score(SUM, [RIGHT]) == [1.0]


def test_unit_tests_refused():
    with pytest.raises(InputError, match="has no tests"):
        UnitTests().score(Problem(question="q"), ["x"])
    with pytest.raises(InputError, match="seconds is 0"):
        UnitTests(seconds=0)
    assert code("a\n```py\nunclosed") == "unclosed"


# -- models as verifiers ---------------------------------------------------------------------------


def test_majority_draws_once_a_problem():
    model = Scripted(["#### 5", "#### 5", "#### 6", "?!"])
    verifier = Majority(model, n=4, sampling=Sampling(seed=1))
    assert verifier.score(SUM, ["#### 5"]) == [0.5]
    assert verifier.score(SUM, ["#### 6"]) == [0.25]
    assert verifier.score(SUM, [" "]) == [0.0]  # no answer
    assert (verifier.tokens, verifier.calls, len(model.asked)) == (7, 4, 1)
    with pytest.raises(InputError, match="n is 0"):
        Majority(model, n=0)


def test_judge_reads_grades():
    warm = Sampling(temperature=1.0)
    model = Scripted(["8", "I would say 4", "no idea", "99"])
    judge = Judge(model, replies=4, sampling=warm)
    assert judge.score(SUM, ["five {answer}"]) == [pytest.approx(0.6)]
    assert judge.unread == 2
    assert "five {answer}" in model.asked[0].prompt
    assert "Sum?" in model.asked[0].prompt
    assert Judge(Scripted(["?"])).score(SUM, ["5"]) == [0.0]
    assert Judge(Scripted(["3.5"]), out_of=5).score(SUM, ["5"]) == [0.7]


def test_judge_refused():
    with pytest.raises(InputError, match=r"it needs \{answer\}"):
        Judge(Scripted([]), template="{question}")
    with pytest.raises(InputError, match="2 replies are the same"):
        Judge(Scripted([]), replies=2)
    with pytest.raises(InputError, match="replies is 0"):
        Judge(Scripted([]), replies=0)


def test_the_implied_reward_is_the_difference_of_log_likelihoods():
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from members import moved, tiny, tokenizer  # type: ignore[import-not-found]

    from pluribus.decode import dial
    from pluribus.decode.scaling.verifiers.implicit_reward import ImplicitReward

    words, base = tokenizer(), tiny(1)
    tuned = moved(base, 2)
    fused = dial(base, {"tuned": tuned}, tokenizers={"base": words, "tuned": words})

    def likely(model, prompt, text):
        first, more = words(prompt)["input_ids"], words(text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([first + more])).logits[0].log_softmax(-1)
        places = range(len(first) - 1, len(first) + len(more) - 1)
        return sum(float(logits[i, t]) for i, t in zip(places, more, strict=True)), len(more)

    problem = Problem(question="Review: a fine")
    (high, count), (low, _) = (likely(m, problem.question, " film") for m in (tuned, base))
    [score] = ImplicitReward(fused).score(problem, [" film"])
    assert score == pytest.approx(1 / (1 + math.exp(low - high)), abs=1e-5)
    [each] = ImplicitReward(fused, per_token=True, scale=2).score(problem, [" film"])
    assert each == pytest.approx(1 / (1 + math.exp(2 * (low - high) / count)), abs=1e-5)
    assert ImplicitReward(fused).score(problem, [""]) == [0.5]
    with pytest.raises(InputError, match="scale is 0"):
        ImplicitReward(fused, scale=0)

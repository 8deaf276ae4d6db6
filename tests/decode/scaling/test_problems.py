"""Problems of files and of named tasks, and strategies as text."""

import json

import pytest

from pluribus.core.errors import FormatError, InputError
from pluribus.decode.scaling import BeamSearch, Sampling, SelfConsistency
from pluribus.decode.scaling.problems import load
from pluribus.decode.scaling.spelled import strategies
from pluribus.tasks import named
from pluribus.tasks.scorers import EXACT, NUMERIC
from pluribus.tasks.task import Example, Examples, Prompt, Task, Text


def test_a_file(tmp_path):
    rows = [
        {"question": "1 + 1?", "answer": 2, "id": "one"},
        {"question": "{x}?", "answer": "1,000.0", "tests": "assert x"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    found = load(str(path), template="Q: {question}\nA:", extract="number")
    one, two = found.problems
    assert (one.question, one.answer, one.id) == ("Q: 1 + 1?\nA:", "2", "one")
    assert (two.question, two.answer, two.tests, two.id) == ("Q: {x}?\nA:", "1000", "assert x", "3")
    assert one.extract("so 2.0") == one.answer
    assert found.name == "p.jsonl"
    assert len(load(str(path), limit=1).problems) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "expected an object with a question"),
        ('{"question": 3}', "expected an object with a question"),
        ('{"question": "q", "answer": [1]}', "answer is .1.; expected a text or a number"),
        ('{"question": "q", "answer": true}', "answer is True"),
    ],
)
def test_bad_lines(tmp_path, line, said):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(FormatError, match=said):
        load(str(tmp_path / "p.jsonl"))


def task(name, score, *targets):
    rows = [Example(Text(f"what {i}"), target) for i, target in enumerate(targets)]
    prompt = Prompt(template="Q: {text}\nA:", stop=("\nQ:",), max_tokens=9)
    return Task(
        name=name,
        load=lambda: Examples(rows, []),
        score=score,
        family="answer",
        prompt=prompt,
    )


@pytest.mark.parametrize(
    ("score", "target", "right", "wrong"),
    [
        (NUMERIC, "1,200", ["so\n#### 1200", "it is $1,200.00"], ["1201", "none"]),
        (EXACT, "(B)", ["(B)", "B.", "The answer is (b)."], ["(A)", "Because"]),
        (EXACT, "left turn", ["Left  turn.", "The answer is: left turn"], ["left", ""]),
    ],
)
def test_tasks_compare_as_their_scorers_do(monkeypatch, score, target, right, wrong):
    made = task("mine", score, target, target)
    monkeypatch.setattr(named, "get", lambda name: made)
    found = load("mine")
    first, second = found.problems
    assert first.question == "Q: what 0\nA:"
    assert first.id != second.id
    assert (found.sampling.stop, found.sampling.max_tokens) == (("\nQ:",), 9)
    for text in right + wrong:
        same = first.extract(text) == first.answer
        assert same == (text in right) == score.right(text, target)


def test_tasks_refused():
    with pytest.raises(InputError, match="has its own template"):
        load("gsm8k", template="{question}")
    with pytest.raises(InputError, match="give at least 1"):
        load("gsm8k", limit=0)


def test_strategies_as_text():
    sampling = Sampling(max_tokens=7)
    found = strategies(
        "self_consistency(confidence=0.9), beam_search(n=8, width=2)", n=4, sampling=sampling
    )
    assert found == {
        "self_consistency(confidence=0.9)": SelfConsistency(n=4, confidence=0.9, sampling=sampling),
        "beam_search(n=8, width=2)": BeamSearch(n=8, width=2, sampling=sampling),
    }

"""`pluribus think`: what is measured is what is told, and kept; what is refused."""

import json
import sys
from pathlib import Path

import pytest

from pluribus.agents import LocalModel
from pluribus.agents.thinking import CoT, CoTPolicy, CoTProbe, Direct, Task
from pluribus.decode.scaling.problems import load

sys.path.insert(0, str(Path(__file__).parents[1] / "decode"))  # tests have no package
from members import tiny, tokenizer  # type: ignore[import-not-found]

SMALL = ("--max-tokens", "4", "--direct-tokens", "2", "--quiet")


@pytest.fixture
def where(place):
    tiny(0, positions=256).save_pretrained(place / "lm")
    tokenizer().save_pretrained(place / "lm")
    rows = [{"question": f"Review: {i}", "answer": ("good", "bad")[i % 2]} for i in range(24)]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.mark.filterwarnings("ignore:.*hold no answer")
def test_what_python_measures_is_what_is_told(cli, where):
    told = cli("think", "lm", "--task", "sums.jsonl", *SMALL, "--json", "--out", "p.json").json
    found = load("sums.jsonl")
    modes = [Direct(max_tokens=2), CoT(max_tokens=4)]
    task = Task.of("sums.jsonl", found.problems)
    effect = CoTProbe(LocalModel.open("lm"), modes).measure(task)
    [own] = told["effects"]
    assert own == json.loads(json.dumps(effect.to_dict()))
    assert own["decision"] == "undecided"
    assert own["n"] == 24
    policy = CoTPolicy.load(where / "p.json")
    assert policy.choose("sums.jsonl") == ("direct", "undecided")


@pytest.mark.filterwarnings("ignore:.*hold no answer")
def test_suites_share_alpha(cli, where):
    tiny(0, positions=2048).save_pretrained(where / "lm")
    told = cli(
        *("think", "lm", "--task", "exceptions", "--task", "aggregate", *SMALL, "--json"),
        *("--n-max", "20", "--modes", "direct, cot, self_consistency(n=2)", "--price", "0.001"),
    ).json
    assert [one["task"] for one in told["effects"]] == ["exceptions", "aggregate"]
    for one in told["effects"]:
        assert one["alpha"] == 0.025
        assert [arm["mode"] for arm in one["arms"]] == [
            "direct",
            "cot",
            "self_consistency(n=2)",
        ]
        assert one["arms"][2]["tokens"] <= 8
        assert one["traits"]["needs_state"] == (one["task"] == "aggregate")


def test_a_table_and_a_page(cli, where):
    done = cli("think", "lm", "--task", "sums.jsonl", *SMALL, "--html", "page.html")
    assert done.code == 0
    assert done.out.splitlines()[0].startswith("task ")
    assert "no answer that can be read" in done.out
    assert "page.html: written" in done.out
    assert "Does thinking pay?" in (where / "page.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--task", "none.jsonl"), "no such file of problems"),
        (("--task", "faces"), "needs an endpoint for vision"),
        (("--task", "grammar", "--difficulty", "hrad"), "Did you mean 'hard'"),
        (("--task", "grammar", "--n-max", "19"), "n_max is 19, too few"),
        (("--task", "grammar", "--price", "-1"), "the price is -1"),
        (("--task", "grammar", "--value", "-1"), "the value is -1"),
        (("--task", "grammar", "--alpha", "2"), "alpha is 2"),
        (("--task", "grammar", "--task", "grammar"), "give each once"),
        (("--task", "grammar", "--modes", "direct"), "give two or more"),
        (("--task", "grammar", "--modes", "direct, best_of_n"), "needs a verifier"),
        (("--task", "grammar", "--out", "sums.jsonl"), "sums.jsonl: exists"),
        (("--task", "grammar", "--html", "none/page.html"), "no such folder"),
    ],
)
def test_refused_in_one_line_before_the_model_is_opened(cli, where, arguments, told):
    before = (where / "sums.jsonl").read_text()
    done = cli("think", "no-such-model", *arguments)
    assert done.code == 1
    assert told in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert (where / "sums.jsonl").read_text() == before


def test_one_label(cli, where):
    rows = [{"question": f"q{i}", "answer": "Yes"} for i in range(30)]
    (where / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = cli("think", "lm", "--task", "one.jsonl")
    assert done.code == 1
    assert "have the answer 'Yes'" in done.err

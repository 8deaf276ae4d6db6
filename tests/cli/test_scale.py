"""`pluribus scale`: the table, the curve, the pool, and what is refused."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "decode"))  # tests have no package
from members import tiny, tokenizer  # type: ignore[import-not-found]

SMALL = ("--max-tokens", "4", "--extract", "text")


@pytest.fixture
def where(place):
    tiny(0, positions=96).save_pretrained(place / "lm")
    tokenizer().save_pretrained(place / "lm")
    rows = [{"question": f"Review: {i}", "answer": "a fine film"} for i in range(2)]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.mark.parametrize("batch", [(), ("--batch", "1"), ("--batch", "9")])
def test_what_was_drawn_by_hand_is_what_is_told(cli, where, batch):
    """One sample a request, or each with its own chance in requests of both problems."""
    from pluribus.agents import LocalModel
    from pluribus.decode.scaling import Problem

    model = LocalModel.open("lm")

    def one(question, seed):
        if "1" in batch:
            return model.sample(question, max_tokens=4, seed=seed)[0]
        return model.sample_many([question], [seed], max_tokens=4)[0]

    first = [Problem(question="", id=str(line)).seed(42) for line in (1, 2)]
    made = [[one(f"Review: {i}", first[i] + k) for k in range(4)] for i in range(2)]
    drawn = [[sample.text.strip() for sample in samples] for samples in made]
    ended = [  # of samples that ended one is chosen before those that were cut
        next((k for k, sample in enumerate(samples) if sample.finish == "end"), usual)
        for samples, usual in zip(made, (0, 3), strict=True)
    ]
    rows = [
        {"question": f"Review: {i}", "answer": texts[k]}
        for i, (texts, k) in enumerate(zip(drawn, ended, strict=True))
    ]
    (where / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = cli(
        *("scale", "lm", "--task", "sums.jsonl", "--n", "4", *SMALL, "--json"),
        *("--strategies", "sample, self_consistency, best_of_n", "--verifier", "exact"),
        *batch,
    ).json
    points = {(one["strategy"], one["n"]): one for one in told["points"]}
    assert set(points) == {
        (name, n) for name in ("sample", "self_consistency", "best_of_n") for n in (1, 2, 4)
    }
    assert points["best_of_n", 4]["accuracy"] == 1.0
    assert points["best_of_n", 4]["calls"] == 4
    first = [texts[0] == row["answer"] for texts, row in zip(drawn, rows, strict=True)]
    assert points["sample", 4]["accuracy"] == sum(first) / 2
    assert told["pass_at_k"]["4"] == 1.0
    assert told["problems"] == 2


def test_a_table_a_page_and_a_pool_that_is_gone_on_with(cli, where):
    command = ("scale", "lm", "--task", "sums.jsonl", *SMALL, "--pool", "pool.jsonl")
    first = cli(*command, "--n", "2")
    assert first.code == 0
    assert "accuracy" in first.out
    assert "pass@k of the samples, 1: " in first.out
    lines = (where / "pool.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2
    more = cli(*command, "--n", "4", "--html", "page.html")
    grown = (where / "pool.jsonl").read_text().splitlines()
    assert grown[: len(lines)] == lines
    assert len(grown) == 1 + 2 * 4
    assert "page.html: written" in more.out
    page = (where / "page.html").read_text()
    assert "Accuracy against tokens" in page
    assert "self_consistency (4)" in page
    again = cli(*command, "--n", "4", "--html", "page.html")
    assert again.out == more.out


def test_strategies_with_parameters(cli, where):
    told = cli(
        *("scale", "lm", "--task", "sums.jsonl", *SMALL, "--json", "--verifier", "exact"),
        *("--strategies", "beam_search(n=2, width=1, rounds=2, separator='e'), sample(n=1)"),
        *("--budget-tokens", "9"),
    ).json
    names = [one["strategy"] for one in told["points"]]
    assert names == ["sample(n=1)", "beam_search(n=2, width=1, rounds=2, separator='e')"]
    assert all(one["tokens"] <= 9 for one in told["points"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", "sum.jsonl"), "Did you mean 'sums.jsonl'"),
        (("--task", "sst2"), "answered by choosing a class"),
        (("--task", "gsm9k"), "Did you mean 'gsm8k'"),
        (("--task", "sums.jsonl", "--strategies", "best_of_n"), "needs a verifier"),
        (("--task", "sums.jsonl", "--strategies", "best_of_m"), "Did you mean 'best_of_n'"),
        (("--task", "sums.jsonl", "--strategies", "a b"), "is no list of strategies"),
        (("--task", "sums.jsonl", "--strategies", "sample(x)"), "is no strategy"),
        (("--task", "sums.jsonl", "--strategies", "sample(n=x)"), "parameters are numbers"),
        (("--task", "sums.jsonl", "--strategies", "sample,sample"), "a strategy twice"),
        (("--task", "sums.jsonl", "--strategies", " "), "no strategy is named"),
        (("--task", "sums.jsonl", "--strategies", "sample(n=0)"), "greater than 0"),
        (("--task", "sums.jsonl", "--budget-tokens", "0"), "allows nothing"),
        (("--task", "sums.jsonl", "--extract", "numbr"), "Did you mean 'number'"),
        (("--task", "sums.jsonl", "--template", "x"), "it needs {question}"),
        (("--task", "sums.jsonl", "--verifier", "head"), "belong together"),
        (("--task", "sums.jsonl", "--head", "h"), "belong together"),
        (("--task", "sums.jsonl", "--verifier", "head", "--head", "h"), "no such head"),
        (("--task", "sums.jsonl", "--verifier", "implicit_reward"), "a stack with the fuser eft"),
        (("--task", "bad.jsonl"), "line 2: there is no field 'anser'"),
        (("--task", "bare.jsonl"), "problem 1 of bare.jsonl has no answer"),
        (("--task", "empty.jsonl"), "holds no problem"),
        (("--task", "sums.jsonl", "--pool", "bad.jsonl"), "is no pool of samples"),
        (("--task", "sums.jsonl", "--pool", "no/pool.jsonl"), "cannot be written"),
        (("--task", "sums.jsonl", "--html", "no/page.html"), "no such folder"),
        (("--task", "sums.jsonl", "--top-p", "0"), "top_p"),
        (("--task", "sums.jsonl", "--endpoint", "localhost"), "no address of an endpoint"),
        (
            (
                *("--task", "sums.jsonl", "--endpoint", "http://localhost:1/v1"),
                *("--strategies", "beam_search", "--verifier", "exact"),
            ),
            "which this endpoint cannot",
        ),
    ],
)
def test_what_is_refused(refused, where, arguments, said):
    (where / "bad.jsonl").write_text('{"question": "q"}\n{"question": "q", "anser": "a"}\n')
    (where / "bare.jsonl").write_text('{"question": "q"}\n')
    (where / "empty.jsonl").write_text("\n")
    assert said in refused("scale", "lm", *arguments)


def test_help_has_an_example(cli):
    assert "Example: pluribus scale model/" in cli("scale", "--help").out

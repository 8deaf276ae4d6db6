"""Reports: scores and errors by hand, samples, digests, normalisation, tables and pages."""

import dataclasses
import json
import math
from decimal import Decimal

import numpy as np
import pytest

from pluribus.core.errors import InputError, MismatchError
from pluribus.tasks.evaluate import Report, Reports, evaluate, evaluate_all
from pluribus.tasks.scorers import (
    ACCURACY,
    EXACT,
    MATTHEWS,
    NUMERIC,
    last_number,
    matthews,
    same_answer,
    same_number,
    short_answer,
)
from pluribus.tasks.systems import Predictions
from pluribus.tasks.task import Example, Examples, Prompt, Task, Text, digest, sample


@dataclasses.dataclass(frozen=True)
class Echo:
    """Is right where a text says so: `right` or `wrong`, or as `share` of the seed's rows."""

    label: str = "echo"
    words: tuple[str, ...] = ("right",)
    mark: str = "d0"

    @property
    def settings(self):
        return {"words": len(self.words)}

    def digest(self):
        return self.mark

    def predict(self, asked, on_step):
        seen.append([row.input.text for row in asked.rows])
        values = []
        for row in asked.rows:
            right = row.input.text.split()[0] in self.words
            values.append(row.target if right else 1 - row.target)
        if on_step is not None:
            on_step(asked.task.name, len(values), len(values))
        return Predictions(values)


seen = []


@pytest.fixture(autouse=True)
def unseen():
    seen.clear()


def toy(rights=3, wrongs=1, name="toy", **more):
    words = ["right"] * rights + ["wrong"] * wrongs
    rows = [Example(Text(f"{word} {i}"), int(i % 3 == 0)) for i, word in enumerate(words)]
    return Task(name=name, load=lambda: Examples(rows, [], ("no", "yes")), **more)


def test_score_error_and_counts_by_hand():
    report = evaluate(Echo(), toy(3, 1))
    assert (report.score, report.n, report.of) == (0.75, 4, 4)
    assert report.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert report.floor == 0.5  # labels 1 0 0 1
    assert (report.task, report.system, report.metric) == ("toy", "echo", "accuracy")
    assert report.weights == "d0"
    assert report.settings == {"words": 1}
    assert set(report.versions) >= {"pluribus", "python", "numpy"}
    assert report.seconds > 0
    assert report.normalised is None


def test_normalised_to_a_score_a_report_or_a_system():
    task, better = toy(6, 2), Echo("best", ("right", "wrong"))
    alone = evaluate(better, task)
    for specialist in (1.0, alone, better):
        assert evaluate(Echo(), task, specialist=specialist).normalised == 0.75
    assert evaluate(Echo(), task, specialist=0.5).normalised == 1.5
    assert evaluate(Echo(), task, specialist=0.0).normalised is None
    other = evaluate(better, task, limit=3)
    with pytest.raises(MismatchError, match="of 3 rows of toy, not of these 8 rows"):
        evaluate(Echo(), task, specialist=other)


def test_every_system_is_asked_the_same_rows_and_a_seed_repeats_them():
    task = toy(300, 100)
    evaluate_all([Echo("a"), Echo("b", ())], [task], limit=20, seed=5)
    evaluate(Echo(), task, limit=20, seed=5)
    evaluate(Echo(), task, limit=20, seed=6)
    a, b, again, other = seen
    assert a == b == again
    assert len(set(a)) == 20
    assert a != other


def test_a_sample_does_not_depend_on_the_order_of_the_file():
    rows = [Example(Text(f"text {i}"), i % 2) for i in range(100)]
    assert sample(rows, 10, 3) == sample(rows[::-1], 10, 3)
    assert sample(rows, None, 3) == sample(rows, 100, 3) == sample(rows, 500, 3) == rows
    assert sample(rows, 5, 3) == sample(rows, 10, 3)[:5]
    assert sample(rows, 10, 3) != sample(rows, 10, 3, "shots")
    counts = np.zeros(100)
    for seed in range(400):
        for row in sample(rows, 10, seed):
            counts[int(row.input.text.split()[1])] += 1
    assert abs(counts.mean() - 40) < 1e-9
    assert counts.min() > 15  # 4 standard deviations below 40
    assert counts.max() < 65


def test_digests_tell_rows_apart_and_not_their_order():
    rows = [Example(Text("a", "b"), 0), Example(Text("c"), "x"), image(1)]
    assert digest(rows) == digest(rows[::-1])
    for changed in (Example(Text("a", "c"), 0), Example(Text("a", "b"), 1)):
        assert digest([changed, *rows[1:]]) != digest(rows)
    assert digest([*rows[:2], image(2)]) != digest(rows)
    assert evaluate(Echo(), toy()).data != evaluate(Echo(), toy(2, 2)).data


def image(value):
    return Example(np.full((2, 2), value, np.uint8), 0)


def test_matthews_by_hand_and_its_error_by_resampling():
    told, true = [1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]
    # TP 3, TN 3, FP 1, FN 1: (9 - 1) / sqrt(4 * 4 * 4 * 4)
    assert MATTHEWS(told, true) == 0.5
    assert MATTHEWS([1] * 8, true) == 0
    assert MATTHEWS(true, true) == 1
    assert MATTHEWS([1 - t for t in true], true) == -1
    error = MATTHEWS.standard_error(told * 25, true * 25, seed=0)
    assert error == MATTHEWS.standard_error(told * 25, true * 25, seed=0)
    # for balanced classes the correlation is 2 p - 1, with p of the accuracy
    assert error == pytest.approx(2 * ACCURACY.standard_error(told * 25, true * 25, 0), rel=0.1)


def test_matthews_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        told, true = rng.integers(0, 2, (2, 30)).astype(float)
        assert matthews(told, true) == pytest.approx(metrics.matthews_corrcoef(true, told))


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("She earns 12/60 = $0.2 a minute.\n#### 10", 10),
        ("#### 1,234 of 9", 1234),
        ("so it is $1,234.50.", Decimal("1234.5")),
        ("The answer is -7", -7),
        ("3 + 4 = 7\nQuestion", 7),
        (".5 of it", Decimal("0.5")),
        ("none", None),
        ("####", None),
        ("", None),
        ("10.", 10),
    ],
)
def test_the_number_an_answer_ends_in(written, number):
    assert last_number(written) == number


def test_numbers_are_equal_as_numbers():
    assert same_number("it is 10.00", "10")
    assert same_number("1,000", "1000")
    assert not same_number("100", "10")
    assert not same_number("who knows", "10")
    assert NUMERIC(["= 4", "= 5", "six"], ["4", "4", "6"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("written", "target", "right"),
    [
        (" (B)", "(B)", True),
        ("(b) the second", "(B)", True),
        ("B", "(B)", True),
        ("B. the second", "(B)", True),
        ("The answer is (C).", "(C)", True),
        ("But (A)", "(B)", False),
        ("Both", "(B)", False),
        ("(A)", "(B)", False),
        ("", "(B)", False),
        ("True", "True", True),
        ("true.", "True", True),
        ("So the answer is: False", "False", True),
        ("Not true", "True", False),
        ("\n  yes\nQ: more", "Yes", True),
        ("alpha  beta gamma", "alpha beta gamma", True),
        ("beta alpha", "alpha beta", False),
        ("] } )", "] } )", True),
        ("8", "8", True),
        ("8 apples", "8", False),
        ('"plausible"', "plausible", True),
    ],
)
def test_short_answers(written, target, right):
    assert same_answer(written, target) is right
    assert EXACT([written], [target]) == right


def test_short_answer_is_the_first_line_that_says_something():
    assert short_answer("\n\n The answer is 42.\nand more") == "42"
    assert short_answer(" \n ") == ""


def test_refuses_what_makes_no_sense():
    with pytest.raises(InputError, match="limit is 0"):
        evaluate(Echo(), toy(), limit=0)
    with pytest.raises(InputError, match="seed is -1"):
        evaluate(Echo(), toy(), seed=-1)
    with pytest.raises(InputError, match="each label once"):
        evaluate_all([Echo(), Echo()], [toy()])
    with pytest.raises(InputError, match="one or more, each once"):
        evaluate_all([Echo()], [])
    with pytest.raises(InputError, match="a specialist of other is given"):
        evaluate_all([Echo()], [toy()], specialists={"other": 1.0})
    with pytest.raises(InputError, match=r"it must have \{text\}"):
        Prompt(template="{pair}")
    with pytest.raises(InputError, match="nothing else"):
        Prompt(template="{text} {other}")

    class Short(Echo):
        def predict(self, asked, on_step):
            return Predictions([0])

    with pytest.raises(MismatchError, match="made 1 predictions for 4 rows"):
        evaluate(Short(), toy())


def both():
    tasks = [toy(3, 1), toy(1, 1, "hard")]
    systems = [Echo("plain"), Echo("none", ("wrong",), "d1")]
    return evaluate_all(systems, tasks, specialists={"toy": 1.0, "hard": 0.5})


def test_means_over_tasks_by_hand():
    reports = both()
    assert reports.systems == ["plain", "none"]
    assert reports.tasks == ["toy", "hard"]
    score, error = reports.mean("plain")
    assert score == (0.75 + 0.5) / 2
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 4 + 0.5 * 0.5 / 2) / 2)
    assert reports.mean_normalised("plain") == (0.75 + 1.0) / 2
    assert reports.mean_normalised("none") == (0.25 + 1.0) / 2
    some = evaluate_all([Echo()], [toy(3, 1), toy(1, 1, "b")], specialists={"toy": 1.0})
    assert some.mean_normalised("echo") == 0.75
    assert evaluate_all([Echo()], [toy()]).mean_normalised("echo") is None
    assert reports.get("none", "toy").score == 0.25
    assert reports.get("none", "other") is None


def test_reports_survive_json():
    reports = both()
    told = json.loads(json.dumps(reports.to_dict()))
    assert told["means"]["plain"]["normalised"] == 0.875
    back = tuple(Report.from_dict(entry) for entry in told["reports"])
    assert back == reports.reports
    assert told["reports"][0]["normalised"] == 0.75


def test_table_shows_every_score_with_its_error():
    lines = both().table().splitlines()
    assert lines[0].split() == ["task", "metric", "rows", "floor", "plain", "none"]
    assert "0.750 ±0.217 (0.75)" in lines[1]
    assert "0.250 ±0.217 (0.25)" in lines[1]
    assert lines[3].startswith("mean")
    assert "0.625 ±0.207 (0.88)" in lines[3]


def test_page_holds_plots_and_how_it_was_measured():
    page = both().html("Two systems")
    assert page.count("<svg class") == 4
    for text in ("Normalised score", "Mean score of 2 tasks", "d1", "seed 0", "specialist"):
        assert text in page
    assert "0.625 ±0.207" in page
    alone = Reports(evaluate_all([Echo("<b>")], [toy()]).reports).html()
    assert "Normalised" not in alone
    assert "<b>" not in alone.replace("</b>", "")


def test_progress_is_told_and_nothing_printed(capsys):
    told = []
    evaluate_all([Echo()], [toy()], on_step=lambda *now: told.append(now))
    assert told == [("toy", 4, 4)]
    assert capsys.readouterr() == ("", "")

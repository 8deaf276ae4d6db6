"""Answers are found and chosen: against slow obvious versions, and scipy."""

import random
from collections import Counter

import pytest

from pluribus.core.errors import InputError
from pluribus.decode.scaling import answers


def slow_weighted(given, weights):
    most, chosen = None, None
    for answer in given:  # in the order in which they were seen
        if answer is None:
            continue
        total = sum(w for a, w in zip(given, weights, strict=True) if a == answer)
        if most is None or total > most:
            most, chosen = total, answer
    return chosen


@pytest.mark.parametrize("seed", range(40))
def test_votes_are_those_of_a_slow_version(seed):
    rng = random.Random(seed)
    given = [rng.choice(["a", "b", "c", None]) for _ in range(rng.randrange(12))]
    weights = [rng.randrange(8) / 8 for _ in given]
    assert answers.weighted(given, weights) == slow_weighted(given, weights)
    assert answers.majority(given) == slow_weighted(given, [1] * len(given))


def test_none_wins_only_alone():
    assert answers.majority([None, None, "7"]) == "7"
    assert answers.majority([None, None]) is None
    assert answers.majority([]) is None


def test_a_tie_goes_to_the_first_seen_or_to_chance():
    given = ["b", "a", "a", "b", "c"]
    assert answers.majority(given) == "b"
    drawn = Counter(answers.majority(given, random.Random(seed)) for seed in range(200))
    assert set(drawn) == {"a", "b"}
    assert min(drawn.values()) > 60


def test_the_lowest_index_of_equals_is_best():
    assert answers.best([0.2, 0.9, 0.9, 0.1]) == 1


def test_aggregates():
    scores = [0.9, 0.5, 0.8]
    assert answers.aggregate(scores) == 0.8
    assert answers.aggregate(scores, "min") == 0.5
    assert answers.aggregate(scores, "prod") == pytest.approx(0.36)
    with pytest.raises(InputError, match="no scores"):
        answers.aggregate([])
    with pytest.raises(InputError, match="not 'mean'"):
        answers.aggregate(scores, "mean")


def test_sureness_is_the_incomplete_beta_function():
    special = pytest.importorskip("scipy.special")
    for first in range(20):
        for second in range(first + 1):
            wanted = special.betainc(second + 1, first + 1, 0.5)
            assert answers.sure(first, second) == pytest.approx(wanted, abs=1e-12)
    assert answers.sure(0, 0) == 0.5
    assert answers.sure(3, 0) == 1 - 1 / 16  # one answer three times: 15 of 16
    assert answers.sure(4, 0) == 1 - 1 / 32


@pytest.mark.parametrize(
    ("how", "text", "found"),
    [
        ("final", "so it is\n#### 42\nbye", "42"),
        ("final", "Thus \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("final", "I think the answer is: 12.\nOr not.", "12"),
        ("final", "Final Answer: $7$", "7"),
        ("final", "work\n\nParis\n", "Paris"),
        ("final", " \n", None),
        ("boxed", "\\boxed{1} then \\boxed{2}", "2"),
        ("boxed", "\\boxed{never closed", None),
        ("boxed", "none", None),
        ("number", "1,200.0 apples", "1200"),
        ("number", "from 3 to -0", "0"),
        ("number", "it is 0.50", "0.5"),
        ("number", "12000000", "12000000"),
        ("number", "none", None),
        ("line", "a\nb\n\n", "b"),
        ("first_line", "\na\nb", "a"),
        ("text", "  a b ", "a b"),
    ],
)
def test_extractors(how, text, found):
    assert answers.extractor(how)(text) == found


def test_an_unknown_extractor():
    with pytest.raises(InputError, match="Did you mean 'number'"):
        answers.extractor("numbr")


def test_steps_keep_their_separators():
    assert answers.split("a||b||", "||") == ["a||", "b||"]
    assert answers.split("a||b", "||") == ["a||", "b"]
    assert answers.split("", "||") == []
    with pytest.raises(InputError, match="separator of steps is empty"):
        answers.split("a", "")

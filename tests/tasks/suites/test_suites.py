"""All suites: the same from a seed, balanced, each once; what is asked wrongly."""

from collections import Counter

import pytest

from pluribus.core.errors import InputError, RecipeError
from pluribus.tasks.suites import DIFFICULTIES, SUITES, TRAITS, facts, make, suite


def test_the_files_are_the_suites():
    assert list(SUITES) == [
        "aggregate",
        "exceptions",
        "faces",
        "grammar",
        "inconsistency",
        "spatial",
    ]
    kinds = Counter(facts(name).kind for name in SUITES)
    assert kinds == {"hurts people": 3, "control": 3}


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_what_every_suite_keeps(name, difficulty):
    items = suite(name, n=40, seed=3, difficulty=difficulty)
    again = suite(name, n=40, seed=3, difficulty=difficulty)
    assert [one.prompt for one in items] == [one.prompt for one in again]
    assert [one.answer for one in items] == [one.answer for one in again]
    fewer = suite(name, n=7, seed=3, difficulty=difficulty)
    assert [one.prompt for one in fewer] == [one.prompt for one in items[:7]]
    other = suite(name, n=40, seed=4, difficulty=difficulty)
    if name != "faces":  # whose prompts tell only the class
        assert len({one.prompt for one in items}) == 40
        assert len({one.prompt for one in items} & {one.prompt for one in other}) <= 3
    assert len({one.id for one in items}) == 40
    assert all(one.answer in one.choices for one in items)
    assert set(facts(name).traits) <= set(TRAITS)
    counts = Counter(one.answer for one in items)
    assert set(counts) == set(items[0].choices)
    if name != "exceptions":  # where labels are balanced within a list, not among those asked for
        assert max(counts.values()) == min(counts.values())


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"name": "gramar"}, RecipeError, "no suite is called 'gramar'.*mean 'grammar'"),
        ({"name": "grammar", "n": 0}, InputError, "0 items were asked for"),
        ({"name": "grammar", "difficulty": "medum"}, InputError, "mean 'medium'"),
    ],
)
def test_refused(arguments, error, told):
    with pytest.raises(error, match=told):
        suite(**arguments)


def test_more_statements_than_there_are():
    with pytest.raises(InputError, match=r"pairs no new one was found.*ask for fewer"):
        suite("inconsistency", n=4000)


def test_parameters_are_checked():
    from pluribus.tasks.suites.exceptions import Exceptions
    from pluribus.tasks.suites.grammar import Grammar

    with pytest.raises(InputError, match="tests"):
        Grammar(tests=0)
    with pytest.raises(InputError, match="at most 44 tests"):
        make(Grammar(tests=60), 4)
    with pytest.raises(InputError, match="10 at most"):
        make(Exceptions(asked=11), 4)

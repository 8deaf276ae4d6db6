"""`pluribus methods`."""

import pytest

from pluribus.core.registry import MERGERS
from pluribus.tune import TUNERS


def names(got):
    return [line.split()[0] for line in got.out.splitlines()]


def test_all_methods_with_a_summary_each(cli):
    got = cli("methods")
    assert got.code == 0
    assert names(got) == sorted([*MERGERS, *TUNERS])
    assert all(len(line.split()) > 3 for line in got.out.splitlines())


def test_words_narrow_the_list(cli):
    found = names(cli("methods", "sign", "vote"))
    assert "dare_ties" in found
    assert "slerp" not in found
    assert names(cli("methods", "Fisher"))[0] == "fisher"


def test_the_example_of_the_help_finds_something(cli):
    assert "ties" in names(cli("methods", "sign", "conflict"))


def test_no_match(cli):
    got = cli("methods", "zebra")
    assert (got.code, got.out) == (0, "no method has any of these words\n")
    assert cli("methods", "zebra", "--json").json == []


@pytest.mark.parametrize("name", sorted(MERGERS))
def test_every_card(cli, name):
    told = cli("methods", "show", name, "--json").json
    assert told["name"] == name
    text = cli("methods", "show", name).out
    assert f"name        {name}" in text
    assert all(parameter in text for parameter in told["parameters"])


def test_cards_that_are_not_there(cli):
    got = cli("methods", "show", "teis")
    assert got.code == 1
    assert "no method is called 'teis'" in got.err
    assert "Did you mean 'ties'?" in got.err
    for words in (["show"], ["show", "ties", "sce"]):
        got = cli("methods", *words)
        assert got.code == 1
        assert got.err == "pluribus: name one method: pluribus methods show NAME\n"

"""`pluribus methods`."""

import pytest

from pluribus import catalogue
from pluribus.core.registry import MERGERS
from pluribus.tune import TUNERS


def names(got):
    return [line.split()[0] for line in got.out.splitlines()]


def test_all_methods_with_a_summary_each(cli):
    got = cli("methods")
    assert got.code == 0
    assert names(got) == [card.name for card in catalogue.cards()]
    assert {*MERGERS, *TUNERS} <= set(names(got))
    assert all(len(line.split()) > 3 for line in got.out.splitlines())
    planned = [line.split()[0] for line in got.out.splitlines() if line.endswith(" (planned)")]
    assert planned == [card.name for card in catalogue.cards() if not card.built]


def test_words_narrow_the_list(cli):
    found = names(cli("methods", "sign", "vote"))
    assert "dare_ties" in found
    assert "slerp" not in found
    assert names(cli("methods", "Fisher"))[0] == "fisher"


def test_the_example_of_the_help_finds_something(cli):
    assert names(cli("methods", "sign", "conflict", "--needs-no-data"))[0] == "ties"


@pytest.mark.parametrize(
    ("options", "filters"),
    [
        (["--needs-no-data"], {"data": "none"}),
        (["--data", "unlabelled"], {"data": "unlabelled"}),
        (["--trains"], {"trains": True}),
        (["--trains-nothing", "--at", "inference"], {"trains": False, "at": "inference"}),
        (["--where", "logits", "--built"], {"where": "logits", "built": True}),
        (["--planned"], {"built": False}),
    ],
)
def test_filters(cli, options, filters):
    found = catalogue.find([], catalogue.Filters(**filters))
    assert names(cli("methods", *options)) == [card.name for card in found]
    assert 0 < len(found) < len(catalogue.cards())


def test_filters_that_are_none(cli):
    got = cli("methods", "--needs-no-data", "--data", "labelled")
    assert got.code == 1
    assert "contradict each other" in got.err
    assert cli("methods", "--at", "noon").code == 2


def test_side_by_side(cli):
    told = cli("methods", "compare", "ties", "dare_ties", "--json").json
    assert [card["name"] for card in told] == ["ties", "dare_ties"]
    assert told[0]["claim"]["checks"][0]["measured"] < 3
    lines = cli("methods", "compare", "ties", "dare_ties").out.splitlines()
    assert lines[0].split() == ["ties", "dare_ties"]
    assert ["data", "none", "none"] in [line.split() for line in lines]
    got = cli("methods", "compare", "ties")
    assert got.err == "pluribus: name two methods or more: pluribus methods compare NAME NAME\n"
    assert "Did you mean 'sce'" in cli("methods", "compare", "ties", "sc").err


def test_the_choices_of_the_options_are_those_of_the_cards(cli):
    import typing

    from pluribus.cli import methods

    hints = typing.get_type_hints(methods.methods)
    for option, known in (
        ("data", catalogue.DATA),
        ("at", catalogue.AT),
        ("where", catalogue.WHERE),
    ):
        choices = typing.get_args(typing.get_args(hints[option])[0])
        assert choices == known


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

"""Cards: complete, from the code where there is code, and nobody keeps a list."""

import json
import shlex
import statistics
from pathlib import Path

import pytest
import typer

import pluribus
from pluribus import catalogue
from pluribus.catalogue import _systems, records
from pluribus.catalogue._families import FAMILIES
from pluribus.catalogue._find import fields
from pluribus.catalogue.bm25 import words
from pluribus.cli import build
from pluribus.core.errors import FormatError, RecipeError

ROOT = Path(__file__).parents[2]
SOURCE = Path(pluribus.__file__).parent
CARDS = catalogue.cards()
GOOD = _systems.HERE / "systems" / "ties.toml"


def test_every_system_and_every_method_has_one():
    names = [card.name for card in CARDS]
    assert names == sorted(set(names))
    assert sum(card.system for card in CARDS) == 65
    shown = {card.facts.name for card in CARDS if card.facts is not None}
    for family in FAMILIES:
        assert set(family.methods()) <= shown


def test_cards_say_all_there_is_to_say():
    for card in CARDS:
        for text in (card.title, card.summary, card.needs, card.trains, card.memory):
            assert text.strip(), card.name
        assert card.at, card.name
        assert card.where, card.name
        if card.system:
            assert card.link, card.name
        assert bool(card.command) == card.built, card.name
        assert not (card.record and not card.built), card.name


def test_facts_come_from_the_code():
    ties = catalogue.card("ties")
    assert ties.facts.name == "ties"
    assert ties.paper == ties.facts.paper == "arXiv:2306.01708"
    assert ties.doc.startswith("TIES-Merging")
    assert "density" in ties.parameters
    twin = catalogue.card("twin_merging")  # another name than its file's
    assert twin.name == "twin-merging"
    assert twin.facts.name == "twin"
    assert catalogue.card("hogwild").doc  # of a package, which no registry knows
    fisher = catalogue.card("fisher")
    assert (fisher.data, fisher.learns, fisher.where) == ("unlabelled", False, ("weights",))
    assert "Fisher" in fisher.needs


def test_papers_agree_with_the_code_and_the_claims():
    for card in CARDS:
        said = {card.paper}
        if card.facts is not None and card.facts.paper:
            said.add(card.facts.paper)
        if card.record is not None and card.system:
            said.add(card.record.paper)
        assert len(said) == 1, (card.name, said)


def test_built_is_what_is_there():
    for name, system in _systems.systems().items():
        claim = SOURCE / "claims" / f"{system.claim.replace('-', '_')}.py"
        there = bool(system.code) and (SOURCE / system.code).exists()
        assert system.card.built == (there or claim.exists()), name
        if system.code:
            assert (SOURCE / system.code).exists(), f"{name}: {system.code} is not there"


def test_a_system_turns_built_with_its_code():
    text = GOOD.read_text().replace("merge/ties.py", "merge/not_there_yet.py")
    made = _systems.read("no-such-system", text)
    assert not made.card.built
    assert made.card.command == ""
    assert _systems.read("no-such-system", GOOD.read_text()).card.built


def test_commands_parse():
    commands = typer.main.get_command(build()).commands
    for line in {card.command for card in CARDS if card.command}:
        name, *words = shlex.split(line)[1:]
        command = commands[name]
        if words and words[0] in getattr(command, "commands", {}):
            command, name, words = command.commands[words[0]], words[0], words[1:]
        command.make_context(name, words)  # raises for an option that there is not
        for word in words:
            if word.startswith("examples/"):
                assert (ROOT / word).is_file()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("summary", "sumary", "there is no 'sumary' in a card. Did you mean 'summary'?"),
        ('data = "none"', 'data = "some"', "data is 'some'; expected one of none, unlabelled"),
        ('at = ["merge"]', 'at = ["later"]', "at is 'later'; expected one of merge, tune"),
        ('trains = "nothing"\n', "", "trains is missing"),
        ('memory = "', "memory = 3 # ", "memory is 3; expected a text"),
        ("title = ", "title : ", "not TOML"),
    ],
)
def test_a_file_that_is_no_card(old, new, said):
    text = GOOD.read_text()
    assert old in text
    with pytest.raises(FormatError) as error:
        _systems.read("odd", text.replace(old, new, 1))
    assert str(error.value).startswith("catalogue/systems/odd.toml: ")
    assert said in str(error.value)


def test_a_name_that_is_not_there():
    with pytest.raises(RecipeError, match="Did you mean 'ties'"):
        catalogue.card("tiess")


# -- records ---------------------------------------------------------------------------------------


def test_figures_are_those_of_the_stored_records():
    stored = json.loads((ROOT / "benchmarks/results/claims/ibcl.json").read_text())
    first = stored["checks"][0]
    check = catalogue.card("ibcl").record.headline
    assert check.text == first["text"]
    assert check.measured == first["measured"]
    assert check.spread == pytest.approx(statistics.stdev(first["per_seed"]))


def test_figures_by_hand():
    check = records.Check("a over b", True, -2.0, (-3.0, -2.0, -1.0), ">= 0", False)
    assert check.spread == 1.0
    assert check.figure == "-2 ± 1"
    assert records.Check("a", True, 1234.5, (1234.5,), ">= 0", True).figure == "1234"
    assert records.Check("a", True, -0.001, (-0.001,), ">= 0", False).figure == "0"
    passed = records.Check("c", True, 1.0, (1.0,), ">= 0", True)
    told = records.Check("d", False, 1.0, (1.0,), ">= 0", False)
    words = {"paper": "", "data": "", "model": "", "metric": "", "command": "", "added": ""}
    record = records.Record(
        name="x", title="t", seeds=(0,), verdict="fails", checks=(told, check, passed), **words
    )
    assert record.held == (1, 2)
    assert record.line() == "fails (1 of 2 hold); a over b: -2 ± 1, expected >= 0"


def test_the_package_carries_the_stored_records():
    """`python -m pluribus.docs` writes the file; its days are not compared."""
    carried = (SOURCE / "catalogue" / records.FILE).read_text("utf-8")
    made = json.loads(records.collect(ROOT / "benchmarks/results/claims", carried, "2000-01-01"))
    days = [record.pop("added") for record in made.values()]
    before = json.loads(carried)
    for record in before.values():
        record.pop("added")
    assert made == before
    assert "2000-01-01" not in days


def test_a_record_keeps_its_day_until_it_says_something_else(tmp_path):
    told = json.loads((ROOT / "benchmarks/results/claims/ties.json").read_text())
    (tmp_path / "ties.json").write_text(json.dumps(told))
    first = records.collect(tmp_path, "", "2026-01-01")
    assert json.loads(first)["ties"]["added"] == "2026-01-01"
    told["seconds"] += 1  # how long it took is no result
    (tmp_path / "ties.json").write_text(json.dumps(told))
    assert records.collect(tmp_path, first, "2026-02-02") == first
    told["checks"][0]["measured"] += 1
    (tmp_path / "ties.json").write_text(json.dumps(told))
    again = json.loads(records.collect(tmp_path, first, "2026-02-02"))
    assert again["ties"]["added"] == "2026-02-02"


@pytest.mark.parametrize("text", ["{", "[]", '{"claim": "ties"}', '{"no": 1}'])
def test_a_file_that_is_no_record(text, tmp_path):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(FormatError, match=r"odd\.json"):
        records.read(tmp_path)


# -- finding ---------------------------------------------------------------------------------------


def test_filters_against_the_cards_one_by_one():
    found = catalogue.find([], catalogue.Filters(data="none", trains=False, at="inference"))
    wanted = [
        card.name
        for card in CARDS
        if card.data == "none" and card.trains == "nothing" and "inference" in card.at
    ]
    assert [card.name for card in found] == wanted
    assert "hogwild" in wanted
    assert "ties" not in wanted
    little = catalogue.find([], catalogue.Filters(data="unlabelled", where="weights", built=True))
    assert {"adamerging", "ties"} <= {card.name for card in little}
    assert all(card.data != "labelled" and card.built for card in little)
    planned = catalogue.find([], catalogue.Filters(built=False))
    assert all(not card.built for card in planned)


def test_words_find_what_has_the_most_of_them():
    """First what has both words, then what has one of them; nothing that has none."""
    found = catalogue.find(["sign", "conflict"])
    assert found[0].name == "ties"
    counts = []
    for card in found:
        have = set(words(" ".join(fields(card).values())))
        counts.append(len(have & {"sign", "conflict"}))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (2, 1)


def test_what_runs_comes_before_what_is_planned():
    states = [card.built for card in catalogue.find(["gate"])]
    assert states[0]
    assert False in states


def test_side_by_side():
    header, rows = catalogue.compared([catalogue.card("ties"), catalogue.card("m3vit")])
    assert header == ["", "ties", "m3vit"]
    told = {label: cells for label, *cells in rows}
    assert told["state"] == ["built", "planned: not built yet"]
    assert told["density"][1] == ""
    assert all(len(row) == 3 for row in rows)

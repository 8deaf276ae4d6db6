"""`pluribus claims`, with a claim that takes no time."""

import importlib
import json
import os
import sys
from types import ModuleType

import pytest

from pluribus import claims
from pluribus.claims import Check, Claim, _kept
from pluribus.claims._page import markdown
from pluribus.cli import _seeds

CLAIM = Claim(
    name="toy",
    title="a grows",
    paper="none",
    data="none",
    model="none",
    metric="points",
    checks=(
        Check(text="a beats b", left="a", right="b"),
        Check(text="a is far above b", left="a", right="b", margin=50, asserted=False),
    ),
)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Registers the claim `toy`; its figures are `a = 10 + seed` and a `b` that can be set."""
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "kept"))
    module = ModuleType("pluribus.claims.toy")
    figures = {"b": 5.0}

    def measure(seed, on_step):
        if on_step is not None:
            on_step("measuring", 1, 1)
        return {"a": 10.0 + seed, "b": figures["b"]}

    module.CLAIM, module.measure = CLAIM, measure
    monkeypatch.setitem(__import__("sys").modules, "pluribus.claims.toy", module)
    monkeypatch.setattr(claims, "systems", lambda: ["toy"])
    return figures


def test_a_claim_that_holds(cli, place, toy):
    got = cli("claims", "toy", "--out", "records")
    assert got.code == 0
    head, first, second, a, b = got.out.splitlines()
    assert head.startswith("toy: a grows — holds (")
    assert first.split() == [
        "holds",
        "a",
        "beats",
        "b:",
        "6.00",
        "[5.00,",
        "6.00,",
        "7.00],",
        "expected",
        ">=",
        "0",
    ]
    assert second.split()[:2] == ["FAILS", "(reported)"]
    assert a.split() == ["a", "11.00", "±", "1.00"]
    assert b.split() == ["b", "5.00", "±", "0.00"]
    record = json.loads((place / "records" / "toy.json").read_text())
    assert record["verdict"] == "holds"
    assert record["seeds"] == [0, 1, 2]


def test_a_claim_that_fails_is_code_1(cli, place, toy):
    toy["b"] = 11.5
    got = cli("claims", "toy", "--out", "records")
    assert got.code == 1
    assert "toy: a grows — fails" in got.out
    assert got.err == ""
    assert json.loads((place / "records" / "toy.json").read_text())["verdict"] == "fails"


def test_json_and_seeds(cli, place, toy):
    told = cli("claims", "--seeds", "3,5", "--out", "records", "--json").json
    assert [record["seeds"] for record in told] == [[3, 5]]
    assert told[0]["figures"]["a"]["per_seed"] == [13, 15]


def test_a_run_that_was_ended_goes_on(cli, place, toy, monkeypatch):
    measured = []

    def measure(seed, on_step):
        measured.append(seed)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {"a": 10.0 + seed, "b": toy["b"]}

    monkeypatch.setattr(claims, "load", lambda name: (CLAIM, measure))
    assert cli("claims", "toy", "--out", "records").code == 130
    assert not (place / "records" / "toy.json").exists()
    told = cli("claims", "toy", "--out", "records", "--json").json[0]
    assert measured == [0, 1, 1, 2]
    assert told["figures"]["a"]["per_seed"] == [10, 11, 12]
    cli("claims", "toy", "--out", "records")
    assert measured == [0, 1, 1, 2]
    cli("claims", "toy", "--out", "records", "--again")
    assert measured == [0, 1, 1, 2, 0, 1, 2]


def test_kept_figures_that_are_damaged_or_of_other_code_are_measured_anew(
    cli, place, toy, tmp_path, monkeypatch
):
    cli("claims", "toy", "--seeds", "0", "--out", "records")
    (kept,) = (tmp_path / "kept" / "claims").iterdir()
    kept.write_text(kept.read_text()[:20])
    toy["b"] = 6.0
    told = cli("claims", "toy", "--seeds", "0", "--out", "records", "--json").json[0]
    assert told["figures"]["b"]["per_seed"] == [6]
    toy["b"] = 7.0
    monkeypatch.setattr(_kept, "snapshot", lambda: {"*": "other"})
    told = cli("claims", "toy", "--seeds", "0", "--out", "records", "--json").json[0]
    assert told["figures"]["b"]["per_seed"] == [7]


def test_progress(cli, place, toy):
    assert "measuring" in cli("claims", "toy", "--out", "records", terminal=True).err
    assert cli("claims", "toy", "--out", "records", "--quiet", terminal=True).err == ""


def test_a_page_with_tables_and_a_plot(cli, place, toy, monkeypatch):
    def measure(seed, on_step):
        figures = {"a": 10.0 + seed, "b": toy["b"]}
        for system, accuracy, storage in (("merge", 81.0, 12.5), ("<parts>, routed", 98.0, 30.0)):
            figures[f"images/{system}/accuracy"] = accuracy + seed
            figures[f"images/{system}/storage"] = storage
        return figures

    monkeypatch.setattr(claims, "load", lambda name: (CLAIM, measure))
    assert cli("claims", "toy", "--out", "records", "--html", "page.html").code == 0
    page = (place / "page.html").read_text()
    assert "toy: holds" in page
    assert "images: accuracy against storage" in page
    assert "&lt;parts&gt;, routed" in page
    assert "<parts>" not in page
    assert 'data-v="99">99.00' in page  # 98 + 0, 1, 2
    record = json.loads((place / "records" / "toy.json").read_text())
    assert markdown(record).splitlines() == [
        "| images | accuracy | storage |",
        "| --- | ---: | ---: |",
        "| merge | 82.0 (81.0, 82.0, 83.0) | 12.5 |",
        "| <parts>, routed | 99.0 (98.0, 99.0, 100.0) | 30.0 |",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("toi", "no claim is called 'toi'; there are: toy. Did you mean 'toy'?"),
        ("toy --seeds a,b", "--seeds 'a,b': give whole numbers such as 0,1,2"),
        ("toy --seeds 1,1", "--seeds '1,1': give each seed once, none below 0"),
        ("toy --seeds=-1", "--seeds '-1': give each seed once, none below 0"),
        ("toy --out ties.yml", "ties.yml: a file is in the way; name a folder for the records"),
        ("toy --out ties.yml/x", "ties.yml/x: a file is in the way; name a folder for the records"),
    ],
)
def test_bad_input(refused, toy, words, said):
    assert refused("claims", *words.split()) == said


ELSEWHERE = """
import os, sys, time
from pathlib import Path
from pluribus import claims
from pluribus.claims import Check, Claim

CLAIM = Claim(
    name="toy", title="", paper="", data="", model="", metric="",
    checks=(Check(text="a beats b", left="a", right="b"),),
)

def measure(seed, on_step):
    if seed == 7:
        os._exit(3)
    Path(f"began-{seed}").touch()
    while len(list(Path().glob("began-*"))) < 2:  # the other one runs beside
        time.sleep(0.01)
    return {"a": 10.0 + seed, "b": float(os.getpid() == int(os.environ["PARENT"]))}

def one(name, seed, kept):
    sys.modules["pluribus.claims.toy"] = sys.modules[__name__]
    claims.systems = lambda: ["toy"]
    claims.run(name, [seed], kept=kept)
"""


@pytest.fixture
def elsewhere(place, toy, tmp_path, monkeypatch):
    """Has processes measure `toy`, and this one none."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PARENT", str(os.getpid()))
    monkeypatch.setattr(_seeds, "_measure", importlib.import_module("elsewhere").one)

    def not_here(seed, on_step):
        raise AssertionError("measured in this process")

    monkeypatch.setattr(claims, "load", lambda name: (CLAIM, not_here))
    yield
    sys.modules.pop("elsewhere")


def test_seeds_side_by_side_are_measured_by_processes(cli, place, elsewhere, tmp_path):
    got = cli("claims", "toy", "--seeds", "3,5", "--jobs", "2", "--out", "records", "--json")
    assert got.err == ""
    figures = got.json[0]["figures"]
    assert figures["a"]["per_seed"] == [13, 15]
    assert figures["b"]["per_seed"] == [0, 0]
    assert len(list((tmp_path / "kept" / "claims").iterdir())) == 2
    again = cli("claims", "toy", "--seeds", "3,5", "--jobs", "2", "--out", "records", terminal=True)
    assert "toy: seeds" in again.err


def test_a_process_that_ends_without_a_word(refused, elsewhere):
    told = refused("claims", "toy", "--seeds", "7", "--jobs", "2", "--out", "../records")
    assert "give fewer --jobs. Seeds that were done are kept" in told


def test_what_measuring_raises_elsewhere_is_told(refused, place, tmp_path, monkeypatch):
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("PLURIBUS_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("PLURIBUS_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    told = refused(
        "claims", "unival", "--seeds", "0,1", "--jobs", "2", "--out", str(tmp_path / "r")
    )
    assert "PLURIBUS_DATA" in told
    assert refused("claims", "unival", "--jobs", "0") == "--jobs 0: give at least 1"

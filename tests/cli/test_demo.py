"""`pluribus demo`, on models that train in seconds."""

import functools

import pytest

from pluribus import demo
from pluribus.core.weights import Weights

TINY = {"train": 80, "val": 40, "test": 40, "width": 8, "depth": 2, "base_steps": 4, "epochs": 1}


@pytest.fixture
def tiny(monkeypatch, place):
    monkeypatch.setenv("PLURIBUS_CACHE", str(place / "cache"))
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, **TINY))


def test_table_report_and_models(cli, place, tiny):
    got = cli("demo", "--out", "demo-out", terminal=True)
    assert got.code == 0, got
    lines = got.out.splitlines()
    assert lines[0].split()[:3] == ["way", "kind", "score"]
    assert sum("same bits" in line for line in lines) == 4
    assert "DIFFERS" not in got.out
    assert "merging: ties" in got.err
    assert (place / "demo-out" / "report.html").is_file()
    assert len(Weights.open("demo-out/merged.safetensors"))
    assert cli("verify", "demo-out/merged.safetensors").code == 0
    again = cli("demo", "--out", "demo-out", "--json", "--quiet", terminal=True)  # trained already
    assert again.err == ""
    told = again.json
    assert {"ties", "tall_masks", "specialists"} <= {row["name"] for row in told["rows"]}
    assert len(told["tasks"]) == 8


def test_what_a_demo_did_not_write_is_left_alone(refused, tiny):
    for out, said in {
        "base": "base: exists and was not written by a demo; choose another with --out",
        "ties.yml": "ties.yml: exists and was not written by a demo",
        "ties.yml/x": "ties.yml/x: cannot be read or written: Not a directory",
    }.items():
        assert said in refused("demo", "--out", out)

"""`pluribus zoo`, with the zoo that needs no data."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from pluribus.tasks import export
from pluribus.tasks import zoo as zoos

TINY = {"train": 60, "val": 20, "test": 40, "width": 16, "depth": 1, "epochs": 2, "threads": 1}
SIZES = [word for key, value in TINY.items() for word in ("--sizes", f"{key}={value}")]


@pytest.fixture
def home(place, monkeypatch):
    """The working directory, with a cache beside it that nothing else uses."""
    monkeypatch.setenv("PLURIBUS_CACHE", str(place.parent / "cache"))
    monkeypatch.delenv("PLURIBUS_DATA", raising=False)
    return place


def test_alone_it_lists_the_zoos(cli, home):
    head, *lines = cli("zoo").out.splitlines()
    assert head.split() == ["zoo", "about"]
    assert [line.split()[0] for line in lines] == zoos.names()
    assert zoos.summary("demo8") in lines[0]
    assert {row["name"]: row["about"] for row in cli("zoo", "--json").json} == {
        name: zoos.summary(name) for name in zoos.names()
    }


def test_builds_and_then_finds(cli, home):
    got = cli("zoo", "demo8", *SIZES, terminal=True)
    assert got.code == 0
    head, *rows, mean, last = got.out.splitlines()
    assert head.split() == ["task", "classes", "train", "test", "base", "specialist"]
    made = zoos.build("demo8", 0, **TINY)
    base, own = made.scores(made.base), made.expert_scores()
    assert [row.split() for row in rows] == [
        [task, "10", "60", "40", f"{base[task]:.1%}", f"{own[task]:.1%}"] for task in made.tasks
    ]
    assert mean.split()[0] == "mean"
    assert mean.split()[-1] == f"{sum(own.values()) / 8:.1%}"
    assert last.startswith("demo8, seed 0: 0.00 M parameters each, trained in ")
    assert "transposed" in got.err
    again = cli("zoo", "demo8", *SIZES, terminal=True)
    assert "from the cache in" in again.out
    assert again.out.splitlines()[:-1] == got.out.splitlines()[:-1]
    assert again.err == ""
    assert cli("zoo", "demo8", "--seed", 1, *SIZES, "--quiet", terminal=True).err == ""


def test_writes_checkpoints_that_merge_reads(cli, home):
    told = cli("zoo", "demo8", *SIZES, "--out", "made", "--json").json
    out = home / "made"
    made = zoos.build("demo8", 0, **TINY)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"base.safetensors", "zoo.json"} | {
        f"{folder}/{task}.safetensors" for folder in ("experts", "heads") for task in made.tasks
    }
    for path, state in (
        ("base", made.base),
        ("experts/rot90", made.experts["rot90"]),
        ("heads/rot90", made.heads["rot90"]),
    ):
        found = load_file(out / f"{path}.safetensors")
        assert set(found) == set(state)
        assert all(torch.equal(found[name], state[name]) for name in state)
    record = json.loads((out / "zoo.json").read_text())
    assert record == {key: value for key, value in told.items() if key != "out"}
    assert record["sizes"] == TINY
    assert record["tasks"]["rot90"]["specialist"] == made.expert_scores()["rot90"]
    assert not (home / "made.partial").exists()
    (home / "both.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: made/base.safetensors\ndtype: float32\n"
        "parameters: {weight: 0.25}\n"
        "models:\n- model: made/experts/rot90.safetensors\n"
        "- model: made/experts/inverted.safetensors\n"
    )
    merged = cli("merge", "both.yml", "both.safetensors")
    assert merged.code == 0, merged
    tensor, name = load_file(home / "both.safetensors")["stem.weight"], "stem.weight"
    own, other = made.experts["rot90"][name], made.experts["inverted"][name]
    torch.testing.assert_close(tensor, made.base[name] / 2 + (own + other) / 4)


def test_overwrites_a_zoo_and_nothing_else(cli, home):
    assert cli("zoo", "demo8", *SIZES, "--out", "made").code == 0
    refusal = cli("zoo", "demo8", *SIZES, "--out", "made")
    assert refusal.code == 1
    assert "holds a zoo already" in refusal.err
    before = (home / "made" / "base.safetensors").read_bytes()
    got = cli("zoo", "demo8", "--seed", 1, *SIZES, "--out", "made", "--overwrite")
    assert got.code == 0
    assert (home / "made" / "base.safetensors").read_bytes() != before
    assert json.loads((home / "made" / "zoo.json").read_text())["seed"] == 1


def test_what_was_put_beside_a_zoo_is_not_lost(cli, home):
    assert cli("zoo", "demo8", *SIZES, "--out", "made").code == 0
    (home / "made" / "notes.txt").write_text("mine")
    (home / "made" / "experts" / "mine.bin").write_text("mine")
    got = cli("zoo", "demo8", *SIZES, "--out", "made", "--overwrite")
    assert got.code == 1
    assert "made: holds experts/mine.bin, notes.txt beside the zoo, which would be lost" in got.err
    assert (home / "made" / "notes.txt").read_text() == "mine"


def test_an_interrupted_write_leaves_the_old_zoo(cli, home, monkeypatch):
    assert cli("zoo", "demo8", *SIZES, "--out", "made").code == 0
    before = (home / "made" / "base.safetensors").read_bytes()
    whole, moves = os.replace, []

    def stop(one, other):
        moves.append(other)
        if len(moves) == 2:
            raise KeyboardInterrupt
        whole(one, other)

    monkeypatch.setattr(export.os, "replace", stop)
    got = cli("zoo", "demo8", *SIZES, "--out", "made", "--overwrite")
    assert got.code == 130
    assert (home / "made" / "base.safetensors").read_bytes() == before
    assert [path.name for path in home.glob("made*")] == ["made"]


def test_a_failed_write_leaves_the_old_zoo(cli, home, monkeypatch):
    assert cli("zoo", "demo8", *SIZES, "--out", "made").code == 0
    before = (home / "made" / "base.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    got = cli("zoo", "demo8", "--seed", 1, *SIZES, "--out", "made", "--overwrite")
    assert got.code == 1
    assert got.err.endswith("made: cannot be written (No space left on device)\n")
    assert (home / "made" / "base.safetensors").read_bytes() == before
    assert not (home / "made.partial").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demo9", "no zoo is called 'demo9'"),
        ("vision-8", "no zoo is called 'vision-8'"),
        ("demo8 --sizes width", "size 'width': write KEY=VALUE"),
        ("demo8 --sizes widht=3", "Did you mean 'width'?"),
        ("demo8 --sizes width=x", "width is 'x'; it must be a whole number"),
        ("demo8 --sizes width=0", "width of zoo demo8 is 0; it must be at least 1"),
        ("merge8", "no image set 'mnist'"),
        ("demo8 --out ties.yml", "ties.yml: is a file; name a folder for the zoo"),
        ("demo8 --out base", "base: holds other things than a zoo"),
        ("demo8 --out base --overwrite", "base: holds other things than a zoo"),
        ("demo8 --out no/where", "no such folder to write into"),
        ("demo8 --sizes train=99999999999999999", "out of memory; give smaller sizes"),
        ("--out made", "name a zoo to build: demo8"),
    ],
)
def test_bad_input(refused, home, words, said):
    assert said in refused("zoo", *words.split())


def test_bad_usage(refused, home):
    assert "--seed" in refused("zoo", "demo8", "--seed", "-1", code=2)

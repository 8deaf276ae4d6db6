"""`pluribus search`: finds, stores, goes on, writes a recipe that merges; and its page."""

import os
import re
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from pluribus.core.errors import OutputError
from pluribus.tasks import zoo as zoos

ROOT = Path(__file__).parents[2]
SMALL = {"width": 32, "depth": 1, "epochs": 6, "train": 256, "val": 80, "test": 40, "threads": 1}
SPACE = """
objective: {zoo: demo8}
base_model: base
models: [{model: identity}, {model: rot90}, {model: inverted}]
<<: !oneof
  - {merge_method: task_arithmetic}
  - {merge_method: ties, parameters: {density: !float [0.05, 1.0]}}
parameters: {lambda: !float [0.1, 1.0]}
"""


@pytest.fixture
def space(tmp_path, monkeypatch):
    """The working directory, with space.yml and the zoo demo8 at a size that takes a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "pluribus.search.objective._zoos",
        {("demo8", 0): zoos.build("demo8", 0, cache=False, **SMALL)},
    )
    (tmp_path / "space.yml").write_text(SPACE)
    return tmp_path


def test_table_recipe_and_page(cli, space):
    got = cli("search", "space.yml", "--trials", "5", "--out", "best.yml", "--html", "page.html")
    assert (got.code, got.err) == (0, "")
    lines = got.out.splitlines()
    assert lines[0].split() == ["trial", "score", "seconds", "choices"]
    scores = [float(line.split()[1]) for line in lines[1:6]]
    assert scores == sorted(scores, reverse=True)
    best = re.search(
        r"^best: trial (\d) of 5 \(score ([\d.]+); zoo demo8, seed 0, val\)", got.out, re.M
    )
    assert best
    assert best[1] == lines[1].split()[0]
    assert "best.yml: the best recipe, for pluribus merge best.yml merged/" in got.out
    assert "Score against cost" in Path("page.html").read_text()
    merged = cli("merge", "best.yml", "merged", "--json")
    assert merged.code == 0, merged.err
    assert Path("merged/model.safetensors").is_file()


def test_json_and_an_uninterrupted_run_are_the_same(cli, space):
    whole = cli("search", "space.yml", "--trials", "6", "--json", "--seed", "3").json
    assert whole["objective"] == "zoo demo8, seed 0, val"
    assert whole["space_size"] == -1
    assert len(whole["trials"]) == 6
    assert whole["recipe"]["merge_method"] in ("task_arithmetic", "ties")
    first = cli(
        "search", "space.yml", "--trials", "2", "--store", "s.sqlite", "--seed", "3", "--json"
    )
    second = cli(
        "search", "space.yml", "--trials", "6", "--store", "s.sqlite", "--seed", "3", "--json"
    )
    assert first.json["resumed"] == 0
    assert second.json["resumed"] == 2

    def told(study):
        return [(t["dna"], t["scores"]) for t in study["trials"]]

    assert told(second.json) == told(whole)


def test_best_without_a_file_is_printed(cli, space):
    got = cli("search", "space.yml", "--trials", "2", "--algorithm", "random", "--top", "1")
    assert got.out.count("\n  ") <= 12
    assert "base_model: base" in got.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--algorithm", "evolutio"], "no search algorithm is called 'evolutio'"),
        (["--algorithm", "enas"], "enas shares weights between modules"),
        (["--algorithm", "sweep"], "a sweep tries every point, but parameters.lambda"),
        (["--out", "no/best.yml"], "no/best.yml: name a file in a folder that exists"),
        (["--html", "no/page.html"], "no such folder to write a page into"),
        (["--store", "no/s.sqlite"], "its folder does not exist"),
        (["--budget", "0"], "budget_s = 0.0"),
        (["--out", "space.yml"], "space.yml: exists; give --overwrite"),
        (["--store", "space.yml"], "space.yml: not a store of trials"),
        (["--store", "space.yml", "--no-resume"], "space.yml: exists; leave out --no-resume"),
        (["--out", "other.yml"], "other.models: is where the recipe's models go, and stands in"),
    ],
)
def test_mistakes_are_one_line_and_cost_nothing(cli, space, arguments, told):
    (space / "other.models").mkdir()
    (space / "other.models" / "base.safetensors").write_text("mine")
    got = cli("search", "space.yml", *arguments)
    assert got.code == 1
    assert told in got.err
    assert got.err.count("\n") == 1
    assert (space / "space.yml").read_text() == SPACE
    assert (space / "other.models" / "base.safetensors").read_text() == "mine"
    assert sorted(path.name for path in space.iterdir() if path.suffix == ".html") == []


def test_other_files(cli, space):
    assert "sapce.yml: no such file. Did you mean 'space.yml'?" in cli("search", "sapce.yml").err
    Path("bad.yml").write_text("objective: {zoo: demo8}\nmerge_method: !onof [a]\n")
    got = cli("search", "bad.yml")
    assert (got.code, got.out) == (1, "")
    assert "bad.yml:2: unknown tag '!onof'" in got.err
    cli("search", "space.yml", "--trials", "1", "--store", "s.sqlite")
    Path("other.yml").write_text(SPACE.replace("0.05", "0.1"))
    got = cli("search", "other.yml", "--store", "s.sqlite")
    assert got.code == 1
    assert "s.sqlite holds trials of another space" in got.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is a folder; a space is a YAML file"),
        ("\0", "not valid YAML: unacceptable character #x0000"),
        (SPACE.replace("zoo: demo8", "zoo: [a]"), "zoo is a name such as demo8, not ['a']"),
        (SPACE.replace("zoo: demo8", "tasks: 3"), "tasks are names such as [sst2], not 3"),
        (SPACE.replace("zoo: demo8", "tasks: [mnist]"), "mnist is of images"),
        (SPACE.replace("zoo: demo8", "tasks: [sst2], device: 3"), "device 3: expected cpu, cuda"),
        (SPACE.replace("zoo: demo8", "zoo: demo8, minimise: 3"), "minimise is one or several of"),
    ],
)
def test_spaces_that_are_none(cli, space, text, told):
    (space / "odd.yml").mkdir() if text is None else (space / "odd.yml").write_text(text)
    got = cli("search", "odd.yml", "--trials", "2")
    assert (got.code, got.out, got.err.count("\n")) == (1, "", 1)
    assert told in got.err


def test_what_was_found_is_shown_if_it_cannot_be_saved(cli, space, monkeypatch):
    def full(*_):
        raise OutputError("best.yml: cannot be written (No space left on device)")

    monkeypatch.setattr("pluribus.search.recipe_space.save_best", full)
    got = cli("search", "space.yml", "--trials", "2", "--out", "best.yml")
    assert got.code == 1
    assert got.err == "pluribus: best.yml: cannot be written (No space left on device)\n"
    assert "base_model: base" in got.out
    got = cli("search", "space.yml", "--trials", "2", "--out", "best.yml", "--json")
    assert (got.code, got.err.count("\n")) == (1, 1)
    assert got.json["out"] is None
    assert got.json["recipe"]["base_model"] == "base"


def test_models_of_an_earlier_search_are_replaced(cli, space):
    (space / "best.models").mkdir()
    (space / "best.models" / "base.safetensors").write_text("of another zoo")
    got = cli("search", "space.yml", "--trials", "2", "--out", "best.yml", "--overwrite")
    assert got.code == 0, got.err
    assert cli("merge", "best.yml", "merged").code == 0


@pytest.mark.filterwarnings("ignore:overflow")
def test_merges_that_are_not_finite_fail(cli, space):
    (space / "wild.yml").write_text(SPACE.replace("[0.1, 1.0]}\n", "[1.0e+200, 1.0e+201]}\n"))
    got = cli("search", "wild.yml", "--trials", "2")
    assert got.code == 1
    assert "none of 2 trials has a score: the merge made NaN or infinite values in" in got.err


BUILT = f"""
import time
from pluribus.search import objective
from pluribus.tasks import zoo
objective._zoos["demo8", 0] = zoo.build("demo8", 0, cache=False, **{SMALL!r})
scored = objective.ZooObjective.scored
def slow(self, state):
    time.sleep(0.2)
    return scored(self, state)
objective.ZooObjective.scored = slow
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_command_goes_on(child, cli, space):
    """kill -9, and the same command again: the same trials as without."""
    command = ("search", "space.yml", "--trials", "8", "--store", "s.sqlite", "--json")
    first = child(*command, before=BUILT)
    until = time.monotonic() + 180
    done = 0
    while time.monotonic() < until and first.poll() is None and done < 2:
        try:
            base = sqlite3.connect("s.sqlite")
            done = base.execute("SELECT count(*) FROM trials WHERE status = 'done'").fetchone()[0]
            base.close()
        except sqlite3.OperationalError:
            pass
        time.sleep(0.01)
    assert first.poll() is None, first.communicate()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    resumed = cli(*command).json
    whole = cli("search", "space.yml", "--trials", "8", "--json").json
    assert 2 <= resumed["resumed"] < 8
    assert [t["scores"] for t in resumed["trials"]] == [t["scores"] for t in whole["trials"]]
    assert [t["dna"] for t in resumed["trials"]] == [t["dna"] for t in whole["trials"]]


# -- the page --------------------------------------------------------------------------------------


PAGE = ROOT / "docs" / "search.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_s_python_runs(space):
    text = PAGE.read_text("utf-8")
    found = [
        (text.count("\n", 0, m.start()) + 1, m[2]) for m in FENCE.finditer(text) if m[1] == "python"
    ]
    assert len(found) >= 5
    names: dict = {}
    for line, code in found:
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)


def test_the_page_s_spaces_are_read(space):
    from pluribus.search import tags

    found = [m[2] for m in FENCE.finditer(PAGE.read_text("utf-8")) if m[1] == "yml"]
    assert found
    for text in found:
        assert "objective" in tags.read(text)

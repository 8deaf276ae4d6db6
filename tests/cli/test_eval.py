"""`pluribus eval` and `pluribus tasks`, with models and sets made on the spot."""

import gc
import json
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from pluribus.core.weights import Weights
from pluribus.tasks import sets, texts
from pluribus.tasks import zoo as zoos
from pluribus.tasks.evaluate import evaluate

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
import tiny_model

from pluribus.tasks import named
from pluribus.tasks.language import CausalLM
from pluribus.tasks.runs import labelled

WORDS = ["fine", "funny", "dull", "tired", "long", "good"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Two models, a recipe of their mean and the sets sst2, trec and gsm8k, in the work folder."""
    for name in ("PLURIBUS_DEBUG", "PLURIBUS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLURIBUS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        tiny_model.save(tmp_path / name, seed)
    (tmp_path / "mean.yml").write_text(
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
        "  - {model: b, parameters: {weight: 1}}\n"
    )

    def rows(labels):
        return [
            {
                "text": f"a {WORDS[i % 6]} and {WORDS[i % 5]} film {i}",
                "label": labels[i % len(labels)],
                "split": "train" if i < 10 else "test",
            }
            for i in range(40)
        ]

    texts.write(tmp_path / "data" / "text" / "sst2.jsonl.gz", rows(["negative", "positive"]))
    texts.write(tmp_path / "data" / "text" / "trec.jsonl.gz", rows(["DESC", "HUM", "NUM"]))
    solved = [
        {"question": f"{i} + 1", "answer": "so", "final": str(i + 1), "split": split}
        for i, split in enumerate(["train", "test", "test"])
    ]
    texts.write(tmp_path / "data" / "text" / "gsm8k.jsonl.gz", solved)
    return tmp_path


def test_scores_several_models_side_by_side(bench, cli):
    got = cli("eval", "a", "b", "mean.yml", "--tasks", "sst2,trec", "--limit", 12)
    assert got.code == 0, got.err
    lines = got.out.splitlines()
    assert lines[0].split() == ["task", "metric", "rows", "floor", "a", "b", "mean"]
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["sst2", "accuracy", "12"],
        ["trec", "accuracy", "12"],
    ]
    assert lines[3].startswith("mean")


def test_json_is_what_python_says(bench, cli):
    told = cli("eval", "x=a", "--tasks", "sst2,gsm8k", "--limit", 9, "--shots", 1, "--json").json
    for entry in told["reports"]:
        system = CausalLM.open("a", label="x", shots=1)
        report = evaluate(system, named.get(entry["task"]), limit=9)
        assert entry["score"] == report.score
        assert entry["weights"] == report.weights
        assert entry["data"] == report.data
        assert (entry["system"], entry["settings"]["shots"]) == ("x", 1)
    assert [entry["n"] for entry in told["reports"]] == [9, 2]


def test_a_recipe_is_scored_as_its_merged_folder(bench, cli):
    assert cli("merge", "mean.yml", "merged").code == 0
    first = cli("eval", "mean.yml", "--tasks", "sst2", "--json").json["reports"][0]
    second = cli("eval", "merged", "--tasks", "sst2", "--json").json["reports"][0]
    assert first["score"] == second["score"]
    assert first["weights"] == second["weights"]
    assert not list(bench.glob("pluribus-eval-*"))


def test_models_are_told_apart_by_their_names_or_their_paths():
    assert labelled(("mean.yml", "out/ties.yaml")) == {"mean": "mean.yml", "ties": "out/ties.yaml"}
    assert labelled(("out/a", "b/")) == {"a": "out/a", "b": "b/"}
    assert labelled(("one/m", "two/m")) == {"one/m": "one/m", "two/m": "two/m"}
    assert labelled(("x=one/m", "two/m")) == {"x": "one/m", "m": "two/m"}
    assert labelled(("m=one/k", "two/m")) == {"m": "one/k", "two/m": "two/m"}
    assert labelled(("org/name+lora/x",)) == {"x": "org/name+lora/x"}


def test_specialists_are_models_or_scores(bench, cli):
    told = cli(
        *("eval", "a", "--tasks", "sst2,trec", "--specialists", "sst2=b"),
        *("--specialists", "trec=0.5", "--json"),
    ).json["reports"]
    b = evaluate(CausalLM.open("b"), named.get("sst2"))
    assert told[0]["specialist"] == b.score
    assert told[0]["normalised"] == told[0]["score"] / b.score
    assert told[1]["normalised"] == told[1]["score"] / 0.5


@pytest.mark.parametrize("given", ["y", "b"], ids=["by its name", "by its reference"])
def test_a_specialist_among_the_models_is_scored_once(bench, cli, monkeypatch, given):
    opened, alive = [], []
    whole = CausalLM.open

    def open_one(what, **settings):
        gc.collect()
        assert all(model() is None for model in alive), "two models are in memory"
        opened.append(what)
        system = whole(what, **settings)
        alive.append(weakref.ref(system.model))
        return system

    monkeypatch.setattr(CausalLM, "open", open_one)
    told = cli(
        *("eval", "a", "y=b", "--tasks", "sst2,trec,gsm8k", "--json"),
        *("--specialists", f"sst2={given}", "--specialists", f"trec={given}"),
    ).json["reports"]
    assert opened == ["a", "b"]
    for name in ("sst2", "trec"):
        a, b = (r for r in told if r["task"] == name)
        assert a["specialist"] == b["specialist"] == b["score"]
        assert a["normalised"] == a["score"] / b["score"]
    assert {r["specialist"] for r in told if r["task"] == "gsm8k"} == {None}


def test_a_specialist_of_several_tasks_is_opened_once_and_first(bench, cli, monkeypatch):
    opened = []
    whole = CausalLM.open
    expected = {name: evaluate(whole("b"), named.get(name)).score for name in ("sst2", "trec")}
    monkeypatch.setattr(
        CausalLM, "open", lambda what, **more: opened.append(what) or whole(what, **more)
    )
    arguments = ("eval", "a", "--tasks", "sst2,trec", "--specialists", "sst2=b")
    told = cli(*arguments, "--specialists", "trec=b", "--json").json["reports"]
    assert opened == ["b", "a"]
    assert {entry["task"]: entry["specialist"] for entry in told} == expected


def test_writes_a_page_with_plots(bench, cli):
    got = cli(
        *("eval", "a", "b", "--tasks", "sst2,trec", "--html", "page.html"),
        *("--specialists", "sst2=0.9", "--specialists", "trec=0.9"),
    )
    assert got.code == 0, got.err
    page = (bench / "page.html").read_text("utf-8")
    assert page.count("<svg class") == 4
    assert "Normalised score" in page
    assert "page.html: written" in got.out


def test_progress_goes_to_a_terminal_only(bench, cli):
    assert cli("eval", "a", "--tasks", "sst2", "--limit", 5).err == ""
    assert "sst2" in cli("eval", "a", "--tasks", "sst2", "--limit", 5, terminal=True).err
    assert cli("eval", "a", "--tasks", "sst2", "--limit", 5, "--quiet", terminal=True).err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "name tasks: --tasks sst2,trec"),
        (["a", "--tasks", "sst3"], "no task is called 'sst3'"),
        (["a", "--tasks", "mnist"], "mnist is of images"),
        (["c", "--tasks", "sst2"], "no such file or folder"),
        (["a", "a", "--tasks", "sst2"], "a model is given twice"),
        (["x=a", "x=b", "--tasks", "sst2"], "two models are named x"),
        (["a", "--tasks", "sst2", "--specialists", "b"], "write TASK=MODEL or TASK=SCORE"),
        (["a", "--tasks", "sst2", "--specialists", "trec=b"], "the tasks are sst2"),
        (["a", "--tasks", "sst2", "--specialists", "sst2=0"], "above 0 and at most 1"),
        (["a", "--tasks", "sst2", "--specialists", "sst2=nan"], "above 0 and at most 1"),
        (["a", "--tasks", "sst2", "--specialists", "sst2=93"], "as in sst2=0.93"),
        (["a", "--tasks", "sst2", "--device", "gpu"], "device 'gpu': expected cpu, cuda"),
        (["a", "--tasks", "sst2", "--device", "meta"], "device 'meta' cannot be used here"),
        (["a", "--tasks", "sst2", "--html", "no/page.html"], "no such folder to write a page"),
        (["a", "--tasks", "sst2", "--dtype", "int8"], "'int8' is no element type"),
        (["none.yml", "--tasks", "sst2"], "no such recipe"),
        (["a", "--tasks", "sst2", "--shots", "11"], "10 examples to draw 11 shots"),
        (["a", "--zoo", "demo8", "--harness"], "give one of them"),
        (["a", "--tasks", "sst2", "--include", "data"], "add --harness"),
        (["a", "--zoo", "demo9"], "no zoo is called 'demo9'"),
        (["a", "--zoo", "demo8:x"], "the seed must be a number"),
        (["a", "--harness"], "name tasks of lm-evaluation-harness"),
        (["none", "--harness", "--tasks", "arc_easy"], "no model folder; the harness reads one"),
    ],
)
def test_refuses_in_one_line(bench, cli, arguments, message):
    got = cli("eval", *arguments)
    assert got.code == 1, got
    assert message in got.err
    assert got.err.count("\n") == 1
    assert "internal error" not in got.err
    assert got.out == ""


def test_offline_and_missing_sets_are_said_before_a_model_is_loaded(bench, cli, monkeypatch):
    monkeypatch.setenv("PLURIBUS_OFFLINE", "1")
    got = cli("eval", "a", "--tasks", "rte")
    assert got.code == 1
    assert "no text set 'rte'" in got.err
    assert "unset PLURIBUS_OFFLINE" in got.err
    got = cli("tasks", "rte", "--fetch")
    assert (got.code, got.out, got.err.count("\n")) == (1, "", 1)
    assert "unset PLURIBUS_OFFLINE" in got.err


def test_a_model_whose_scores_are_nan_has_no_score(bench, cli):
    weights = Weights.open("a")
    broken = {name: weights[name].clone() for name in weights}
    next(t for name, t in broken.items() if "norm" in name).fill_(float("nan"))
    Weights.of(broken).save(bench / "a" / "model.safetensors")
    got = cli("eval", "b", "a", "--tasks", "sst2", "--limit", 5)
    assert (got.code, got.out, got.err.count("\n")) == (1, "", 1)
    assert "a: its scores are NaN for 5 of 5 rows of sst2" in got.err


def test_harness_without_its_package_says_what_to_install(bench, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    got = cli("eval", "a", "--harness", "--tasks", "arc_easy")
    assert got.code == 1
    assert "pip install 'pluribus[eval]'" in got.err


@pytest.fixture
def small_zoo(bench, monkeypatch):
    sizes = {"train": 60, "val": 20, "test": 40, "width": 16, "depth": 1}
    build = partial(zoos.build, base_steps=3, epochs=1, threads=1, **sizes)
    monkeypatch.setattr(zoos, "build", build)
    return build("demo8", 0)


def test_zoo_weights_are_scored_on_the_zoos_tasks(bench, cli, small_zoo):
    average = {
        name: torch.stack([e[name] for e in small_zoo.experts.values()]).mean(0)
        for name in small_zoo.base
    }
    Weights.of(average).save(bench / "average.safetensors")
    told = cli("eval", "average.safetensors", "--zoo", "demo8", "--json").json
    scores = {entry["task"]: entry for entry in told["reports"]}
    for task, share in small_zoo.normalised(average).items():
        assert scores[f"demo8/{task}"]["normalised"] == pytest.approx(share)
    only = cli("eval", "average.safetensors", "--zoo", "demo8", "--tasks", "rot90", "--json").json
    assert [entry["task"] for entry in only["reports"]] == ["demo8/rot90"]
    got = cli("eval", "average.safetensors", "--zoo", "demo8", "--tasks", "rot91")
    assert "Did you mean 'rot90'?" in got.err
    average["stem.weight"][0, 0] = float("nan")
    Weights.of(average).save(bench / "broken.safetensors")
    got = cli("eval", "average.safetensors", "broken.safetensors", "--zoo", "demo8")
    assert (got.code, got.err.count("\n")) == (1, 1)
    assert "broken.safetensors: its scores are NaN for 40 of 40 rows of demo8/identity" in got.err
    del average["stem.weight"]
    Weights.of(average).save(bench / "less.safetensors")
    got = cli("eval", "less.safetensors", "--zoo", "demo8")
    assert "less.safetensors: the weights lack stem.weight of zoo demo8" in got.err


# -- pluribus tasks --------------------------------------------------------------------------------


def test_tasks_are_listed_with_where_their_data_is(bench, cli):
    got = cli("tasks")
    assert got.code == 0
    rows = {line.split()[0]: line.split() for line in got.out.splitlines() if line.split()}
    assert rows["sst2"] == ["sst2", "text", "accuracy", "PLURIBUS_DATA"]
    assert rows["rte"][3:] == ["public", "source"]
    assert rows["digits"][3] == "embedded"
    assert rows["mnist"][3:] == ["not", "found"]
    assert rows["text14:"][1] == "14"


def test_tasks_are_shown(bench, cli):
    got = cli("tasks", "trec", "--show")
    assert got.code == 0, got.err
    assert "10 train, 30 test" in got.out
    assert "choices   description, person, number" in got.out
    assert "The answer is a kind of:" in got.out
    assert "https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/" in got.out
    told = cli("tasks", "gsm8k", "--show", "--json").json
    assert told["tasks"][0]["train"] == 1
    assert len(told["groups"]["bbh"]) == 27


def test_tasks_are_fetched(bench, cli, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pluribus.tasks.download.text_set", lambda name, folder, on_bytes: asked.append(name)
    )
    assert cli("tasks", "sst2", "rte", "mrpc", "--fetch").code == 0
    assert asked == ["rte", "mrpc"]
    got = cli("tasks", "mnist", "--fetch")
    assert (
        got.err == "warning: no public source for mnist; put the sets into PLURIBUS_DATA by hand\n"
    )
    assert json.loads(json.dumps(sets.records("sst2")[0]))["split"] == "train"

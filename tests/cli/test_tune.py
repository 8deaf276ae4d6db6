"""`pluribus tune`: a run on language models, its replay, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pluribus import Weights

sys.path.insert(0, str(Path(__file__).parents[1] / "recipe"))  # collected without a package
import tiny

RECIPE = """
tune_method: adamerging
parameters: {steps: 4, lr: 0.05}
base_model: base
models:
  - {model: math, data: math.jsonl}
  - {model: code, data: code.txt}
batch_size: 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Three tiny language models, a text file for each expert, and a recipe."""
    pytest.importorskip("transformers")
    tiny.model(tmp_path / "base")
    tiny.model(tmp_path / "math", seed=1, base=0)
    tiny.model(tmp_path / "code", seed=2, base=0)
    texts = ["the river runs", "a slow road", "polymer binds", "return the index", "low"]
    rows = [{"text": text, "answer": "river"} for text in texts]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "code.txt").write_text("\n\n".join(reversed(texts)))
    (tmp_path / "tune.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewritten(models, **changes):
    told = RECIPE
    for old, new in changes.values():
        assert old in told
        told = told.replace(old, new)
    (models / "tune.yml").write_text(told)


def test_the_model_and_its_replay_are_the_same_bits(cli, models):
    got = cli("tune", "tune.yml", "out", "--html", "page.html")
    assert got.code == 0, got.err
    assert "4 steps, loss" in got.out
    assert "mean coefficient" in got.out
    assert "<svg" in (models / "page.html").read_text()
    again = cli("merge", "out/recipe.yml", "again")
    assert again.code == 0, again.err
    one, two, base = (Weights.open(models / name) for name in ("out", "again", "base"))
    assert list(one) == list(two)
    for name in one:
        assert one.source(name).load().tobytes() == two.source(name).load().tobytes()
    assert any(not torch.equal(one[name], base[name]) for name in one)
    assert (models / "out" / "config.json").is_file()
    assert cli("verify", "out").code == 0


def test_the_recipe_replays_from_another_folder(cli, models, monkeypatch, tmp_path):
    assert cli("tune", "tune.yml", "out").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    got = cli("merge", str(models / "out" / "recipe.yml"), "again")
    assert got.code == 0, got.err


def test_json_is_one_document(cli, models):
    told = cli("tune", "tune.yml", "out", "--json").json
    assert told["method"] == "adamerging"
    assert told["steps"] == 4
    assert set(told["coefficients"]) == set(Weights.open(models / "base"))
    history = json.loads((models / "out" / "tuning.json").read_text())["history"]
    assert [step["number"] for step in history] == [1, 2, 3, 4]


def test_labels_are_the_first_token_of_the_answer(cli, models):
    rewritten(
        models,
        a=("parameters:", "objective: cross_entropy\nparameters:"),
        b=("data: code.txt", "data: math.jsonl"),
    )
    got = cli("tune", "tune.yml", "out", "--json")
    assert got.code == 0, got.err
    assert got.json["loss"][1] < got.json["loss"][0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("adamerging", "adamergin", "Did you mean 'adamerging'"),
        ("steps: 4", "step: 4", "Did you mean 'steps'"),
        ("steps: 4", "steps: 0", "steps = 0"),
        ("base_model: base\n", "", "give a zoo, or base_model and models"),
        (", data: code.txt", "", "code has no data"),
        ("code.txt", "cod.txt", "cod.txt: no such file of texts"),
        ("model: math,", "model: maths,", "maths: no such file or folder"),
        ("batch_size: 3", "batch_sise: 3", "Did you mean 'batch_size'"),
        ("tune_method", "merge_method", "pluribus merge"),
        ("parameters:", "objective: entropi\nparameters:", "Did you mean 'entropy'"),
        ("parameters:", "objective: cross_entropy\nparameters:", 'rows {"text", "answer"}'),
        ("tune_method", "{", "not valid YAML"),
    ],
)
def test_recipes_that_cannot_run(cli, models, old, new, said):
    rewritten(models, only=(old, new))
    got = cli("tune", "tune.yml", "out")
    assert got.code == 1
    assert got.err.count("\n") == 1
    assert said in got.err
    assert not (models / "out").exists()


def test_files_that_are_no_texts(cli, models):
    (models / "math.jsonl").write_text('{"text": "the"}\n{"txt": 1}\n')
    assert "math.jsonl, line 2" in cli("tune", "tune.yml", "out").err
    (models / "math.jsonl").write_text("\n\n")
    assert "holds no text" in cli("tune", "tune.yml", "out").err
    (models / "math.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in cli("tune", "tune.yml", "out").err


def test_nothing_that_exists_is_lost(cli, models):
    (models / "out").mkdir()
    (models / "out" / "precious.txt").write_text("mine")
    got = cli("tune", "tune.yml", "out")
    assert got.code == 1
    assert "exists already" in got.err
    assert (models / "out" / "precious.txt").read_text() == "mine"
    assert cli("tune", "missing.yml", "new").code == 1


def test_a_zoo_of_the_package(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "cache"))
    sizes = "{train: 64, val: 16, test: 32, width: 16, depth: 2, base_steps: 2, epochs: 1}"
    (tmp_path / "tune.yml").write_text(
        f"tune_method: adamerging\nparameters: {{steps: 2}}\nzoo: demo8\nzoo_sizes: {sizes}\n"
    )
    got = cli("tune", str(tmp_path / "tune.yml"), str(tmp_path / "out"))
    assert got.code == 0, got.err
    assert "there is no recipe to replay" in got.err
    text = (tmp_path / "tune.yml").read_text()
    (tmp_path / "tune.yml").write_text(f"{text}objective: cross_entropy\n")
    refused = cli("tune", str(tmp_path / "tune.yml"), str(tmp_path / "other"))
    assert "learn from those it is scored on" in refused.err

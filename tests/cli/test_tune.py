"""`pluribus tune`: a run on language models, its replay, and what it refuses."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

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
        (
            "batch_size: 3",
            "batch_size: 3\nbatch_size: 4",
            "yml:9: 'batch_size' is given twice",
        ),
        (
            "batch_size: 3",
            "batch_size: 0",
            "tune.yml:8: batch_size: Input should be greater than",
        ),
        ("batch_size: 3", "batch_size: 0", "not 0"),
        ("batch_size: 3", f"seed: {2**64}", "seed: Input should be less than 9223372036854775808"),
        ("batch_size: 3", "device: gpu", "device 'gpu': expected cpu, cuda or cuda:N"),
        ("batch_size: 3", "device: meta", "device 'meta' cannot be used here"),
        ("batch_size: 3", "---\nzoo: demo8", "holds 2 documents; a tuning recipe is one"),
        ("data: code.txt", "data: base", "base: is a folder; data is a file of texts"),
        (
            "data: code.txt",
            "data: [a]",
            "models[1].data: Input should be a valid string, not",
        ),
    ],
)
def test_recipes_that_cannot_run(cli, models, old, new, said):
    rewritten(models, only=(old, new))
    got = cli("tune", "tune.yml", "out")
    assert got.code == 1
    assert got.err.count("\n") == 1
    assert said in got.err
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "there is no recipe in it"),
        (b"- a", "a tuning recipe is keys with values, the first of them tune_method, not list"),
        (b"\xff\xfe", "not a text file in UTF-8"),
        (b"\0", "not valid YAML: unacceptable character #x0000"),
        (None, "is a folder; a recipe is a YAML file"),
    ],
)
def test_files_that_are_no_recipe(cli, tmp_path, text, said):
    path = tmp_path / "r.yml"
    path.mkdir() if text is None else path.write_bytes(text)
    got = cli("tune", path, tmp_path / "out")
    assert (got.code, got.out, got.err.count("\n")) == (1, "", 1)
    assert f"{path}: {said}" in got.err
    got = cli("tune", tmp_path / "e.yml", tmp_path / "out")
    assert "e.yml: no such recipe. Did you mean 'r.yml'?" in got.err


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("train: many", "train of zoo demo8 is 'many'; it must be a whole number"),
        ("train: 1.5", "train of zoo demo8 is 1.5; it must be a whole number"),
        ("train: null", "train of zoo demo8 is None; it must be a whole number"),
        ("train: true", "train of zoo demo8 is True; it must be a whole number"),
        ("seed: 1", "zoo demo8 has no parameter 'seed'"),
        ("cache: false", "zoo demo8 has no parameter 'cache'"),
        ("on_step: 1", "Did you mean 'base_steps'?"),
    ],
)
def test_sizes_that_a_zoo_has_not(cli, tmp_path, sizes, said):
    (tmp_path / "r.yml").write_text(
        f"tune_method: adamerging\nzoo: demo8\nzoo_sizes: {{{sizes}}}\n"
    )
    got = cli("tune", tmp_path / "r.yml", tmp_path / "out")
    assert (got.code, got.err.count("\n")) == (1, 1)
    assert said in got.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": null}', "line 1: text is None, which is no text"),
        ('{"text": ["a"]}', "line 1: text is ['a'], which is no text"),
        ('{"text": "the", "answer": null}', "line 1: answer is None, which is no text"),
        ('{"text": "the", "answer": " "}', "line 1: the objective needs labels"),
        ('{"text": "the"}', "line 1: the objective needs labels"),
    ],
)
def test_rows_without_text_or_answer(cli, models, row, said):
    rewritten(
        models,
        a=("parameters:", "objective: cross_entropy\nparameters:"),
        b=("data: code.txt", "data: math.jsonl"),
    )
    (models / "math.jsonl").write_text(row + "\n")
    got = cli("tune", "tune.yml", "out")
    assert (got.code, got.err.count("\n")) == (1, 1)
    assert f"math.jsonl, {said}" in got.err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "{", "base: not a language model that can be opened"),
        ("config.json", '{"model_type": "llamma"}', "base: not a language model that can be"),
        ("config.json", None, "base: no config.json beside the tensors"),
        ("tokenizer.json", "{", "base: not a language model that can be opened"),
        ("tokenizer.json", None, "look at its config.json and tokenizer"),
        ("heads", 0, "base: not a language model that can be opened"),
        ("num_hidden_layers", 2, "LlamaForCausalLM has no model.layers.2.self_attn.q_proj.weight"),
        ("intermediate_size", 8, "base: model.layers.0.mlp.up_proj.weight has shape [24, 16], but"),
    ],
)
def test_a_base_that_is_no_language_model(cli, models, name, text, said):
    path = models / "base" / (name if name.endswith(".json") else "config.json")
    if text is None:
        path.unlink()
    elif isinstance(text, int):
        name = "num_attention_heads" if name == "heads" else name
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: text}))
    else:
        path.write_text(text)
    got = cli("tune", "tune.yml", "out")
    assert (got.code, got.err.count("\n")) == (1, 1)
    assert said in got.err
    assert not (models / "out").exists()


@pytest.mark.parametrize("who", ["base", "math"])
def test_a_model_that_is_not_finite_is_named(cli, models, who):
    values = tiny.arrays(Weights.open(models / who))
    values["model.norm.weight"][0] = float("nan")
    tiny.save(models / who / "model.safetensors", values)
    got = cli("tune", "tune.yml", "out")
    assert got.code == 1
    assert f"{who}: tensor 'model.norm.weight' holds NaN or infinite values; repair" in got.err


def test_a_huge_lr_is_told(cli, models):
    rewritten(models, only=("lr: 0.05", "lr: 1.0e+30"))
    got = cli("tune", "tune.yml", "out")
    assert got.code == 0
    assert "39 of 39 rows of coefficients were thrown far out of clamp = (0, 1)" in got.err


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


def never(*_, **__):
    pytest.fail("the work was begun before its output was looked at")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("no/out", "no: no such folder to write out into"),
        ("code.txt", "code.txt: is a file; name a folder"),
        ("code.txt/out", "code.txt: is no folder to write out into"),
        ("full", "full: holds other things than an output of pluribus"),
        ("base", "base: holds other things than an output of pluribus"),
        ("out.safetensors", "name a folder"),
    ],
)
def test_an_output_that_cannot_be_is_told_first(cli, models, monkeypatch, out, said):
    monkeypatch.setattr("pluribus.tune.adamerging.AdaMerging.fit", never)
    (models / "full").mkdir()
    (models / "full" / "precious.txt").write_text("mine")
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    got = cli("tune", "tune.yml", out, "--overwrite")
    assert (got.code, got.err.count("\n")) == (1, 1)
    assert said in got.err
    assert before == {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}


def test_an_output_is_replaced_unless_the_run_reads_it(cli, models, monkeypatch):
    assert cli("tune", "tune.yml", "out").code == 0
    assert cli("tune", "tune.yml", "out", "--overwrite").code == 0
    monkeypatch.setattr("pluribus.tune.adamerging.AdaMerging.fit", never)
    rewritten(models, only=("base_model: base", "base_model: out"))
    got = cli("tune", "tune.yml", "out", "--overwrite")
    assert "out: base is read from there; choose another output" in got.err
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    got = cli("tune", "tune.yml", "other")
    assert "other: the model needs 0.00 GB, but only 0.00 GB are free there" in got.err
    monkeypatch.setattr("os.access", lambda _, mode, **more: mode != os.W_OK)
    assert "may not be written into" in cli("tune", "tune.yml", "other").err


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

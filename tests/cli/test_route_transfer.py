"""`pluribus route transfer`: from a recipe to an adapter, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # tests have no package
import tiny_model  # type: ignore[import-not-found]

from pluribus.route.adapters import AdapterSet
from pluribus.route.transfer import METHODS, load
from pluribus.route.transfer import _recipe as recipes

ROOT = Path(__file__).parents[2]
ZOO = """zoo: demo8
zoo_sizes: {epochs: 1}
bottleneck: 4
sources: [{name: identity}, {name: inverted}]
source_epochs: 2
source_lr: 0.01
target: {name: rot90, labels: 40}
method: scalearn_uniform++
compare: [single_adapter]
steps: 20
head_lr: 0.01
limit: 200
"""
TEXTS = """base_model: lm
bottleneck: 4
sources:
- {name: reviews, data: reviews.jsonl}
- {name: topics, data: topics.jsonl}
source_epochs: 20
source_lr: 0.01
target: {name: tickets, data: tickets.jsonl, labels: 12, test: later.jsonl}
method: scalearn
parameters: {dropout: 0.1}
compare: [adapter_fusion, single_adapter]
steps: 40
head_lr: 0.02
"""
WORDS = {"good": "yes 12", "bad": "no 56", "odd": "maybe 90"}


def rows(count: int, words: dict[str, str], seed: int) -> str:
    rng = torch.Generator().manual_seed(seed)
    lines = []
    for i in range(count):
        answer = list(words)[i % len(words)]
        noise = " ".join(str(n) for n in torch.randint(10, (3,), generator=rng).tolist())
        lines.append(json.dumps({"text": f"{words[answer]} film {noise}", "answer": answer}))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """One cache for all: the zoo is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def where(place, cached, monkeypatch):
    monkeypatch.setenv("PLURIBUS_CACHE", str(cached))
    (place / "zoo.yml").write_text(ZOO)
    return place


@pytest.fixture
def texts(where):
    pytest.importorskip("transformers")
    tiny_model.save(where / "lm")
    two = {key: WORDS[key] for key in ("good", "bad")}
    (where / "reviews.jsonl").write_text(rows(40, two, 0))
    (where / "topics.jsonl").write_text(rows(40, {"a": "alarm", "b": "account"}, 1))
    (where / "tickets.jsonl").write_text(rows(30, WORDS, 2))
    (where / "later.jsonl").write_text(rows(30, WORDS, 3))
    (where / "texts.yml").write_text(TEXTS)
    return where


def test_texts_from_recipe_to_an_adapter(cli, texts):
    told = cli("route", "transfer", "texts.yml", "out", "--json").json
    assert list(told["methods"]) == ["scalearn", "adapter_fusion", "single_adapter"]
    found = told["methods"]["scalearn"]
    assert found["numbers"] == 2 * 2 * 32  # layers, sources, width
    assert found["method"]["dropout"] == 0.1
    assert list(found["contributions"]) == ["reviews", "topics"]
    assert told["classes"] == ["bad", "good", "odd"]
    assert told["rows"] == {"train": 12, "val": 18, "test": 30}
    assert found["test"]["accuracy"] > 0.9
    names = {str(p.relative_to(texts / "out")) for p in (texts / "out").rglob("*.*")}
    assert names == {
        *("adapter.safetensors", "head.safetensors", "transfer.safetensors", "report.json"),
        *("sources/reviews.safetensors", "sources/topics.safetensors"),
    }
    assert json.loads((texts / "out" / "report.json").read_text())["methods"] == told["methods"]

    from safetensors.torch import load_file
    from transformers import AutoModel

    model = AutoModel.from_pretrained(texts / "lm", dtype=torch.float32).eval()
    sources = {
        name: AdapterSet.load(texts / "out" / "sources" / f"{name}.safetensors", model)
        for name in ("reviews", "topics")
    }
    result = load(texts / "out" / "transfer.safetensors", model, sources)
    ids = tiny_model.tokenizer()(["yes 12 film 1 2 3"], return_tensors="pt")
    x = {key: ids[key] for key in ("input_ids", "attention_mask")}
    expected = result.logits(model, x)
    with AdapterSet.load(texts / "out" / "adapter.safetensors", model).attach(model):
        hidden = model(**x).last_hidden_state.mean(1)
    head = load_file(texts / "out" / "head.safetensors")
    torch.testing.assert_close(linear(hidden, **head), expected, atol=1e-4, rtol=1e-4)


def test_saved_adapters_are_sources_again(cli, refused, texts):
    cli("route", "transfer", "texts.yml", "out", "--quiet")
    told = yaml.safe_load(TEXTS)
    told["sources"] = [
        {"name": name, "adapter": f"out/sources/{name}.safetensors"}
        for name in ("reviews", "topics")
    ]
    (texts / "again.yml").write_text(yaml.safe_dump(told))
    said = refused("route", "transfer", "again.yml", "out", "--overwrite")
    assert "source reviews is read from there, and would be lost" in said
    again = cli("route", "transfer", "again.yml", "more", "--json").json
    first = json.loads((texts / "out" / "report.json").read_text())
    assert again["methods"]["scalearn"] == first["methods"]["scalearn"]
    assert not (texts / "more" / "sources").exists()


def test_a_zoo_in_words(cli, where):
    out = cli("route", "transfer", "zoo.yml", "out").out.splitlines()
    assert out[0].split() == ["method", "numbers", "trained", "validation", "test", "step", "kept"]
    assert out[1].split()[:2] == ["scalearn_uniform++", "2"]
    assert out[2].startswith("single_adapter")
    assert out[4].split()[:2] == ["source", "mean"]
    assert {line.split()[0] for line in out[5:7]} == {"identity", "inverted"}
    assert "learned from 40 labelled rows of 10 classes" in out[-1]
    seen = cli("route", "transfer", "zoo.yml", "out", "--overwrite", terminal=True)
    assert "scalearn_uniform++" in seen.err  # the bar says what is done


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("zoo: demo8\n", ""), "zoo.yml: give base_model, a folder that transformers opens"),
        (("method: scalearn_uniform++", "method: scalern"), "zoo.yml:8: method: Input should be"),
        (("name: inverted", "name: identity"), "source 'identity' is named twice"),
        (("name: inverted", "name: inverse"), "zoo demo8 has no task 'inverse'"),
        (("name: inverted", "name: a/b"), "names become file names"),
        (("steps: 20", "steps: 0"), "zoo.yml:10: steps: Input should be greater than 0"),
        (("labels: 40", "lables: 40"), "unknown key 'lables'"),
        (("labels: 40", "data: x.jsonl"), "target: a zoo's tasks have their own data"),
        (("{name: inverted}", "{name: b, data: x.jsonl}"), "a zoo's tasks have their own data"),
        (("{name: inverted}", "{name: b, adapter: x.safetensors}"), "x.safetensors: no such file"),
        (("bottleneck: 4", "layers: blokcs"), "layers 'blokcs' matches no module"),
        (("bottleneck: 4", "placement: behind"), "give those too"),
        (("limit: 200", "parameters: {dropout: 1}"), "dropout is 1; it must be at least 0"),
        (("limit: 200", "parameters: {drop: 1}"), "scalearn_uniform++ has no 'drop'"),
        (("limit: 200", "device: tpu"), "device 'tpu'"),
        (("method: scalearn_uniform++", "parts: low_rank"), "pluribus route build"),
    ],
)
def test_recipes_that_are_refused(refused, where, change, said):
    (where / "zoo.yml").write_text(ZOO.replace(*change))
    assert said in refused("route", "transfer", "zoo.yml", "out", "--quiet")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("base_model: lm", "base_model: ml"), "ml: no config.json in it"),
        (("data: topics.jsonl", "data: none.jsonl"), "none.jsonl: no such file of texts"),
        (("labels: 12", "labels: 99"), "tickets has 30 rows; labels: 99 is more"),
        (("labels: 12", "labels: 1"), "have 1 kind of answer"),
        (("test: later.jsonl", "test: topics.jsonl"), "the answer 'a' is none of the classes"),
        (("{name: reviews, data: reviews.jsonl}", "{name: r}"), "has neither data nor an adapter"),
        (("data: reviews.jsonl", "data: reviews.jsonl, adapter: a"), "or an adapter"),
        (("target: {name: tickets, data: tickets.jsonl,", "target: {name: t,"), "target has no"),
    ],
)
def test_texts_that_are_refused(refused, texts, change, said):
    (texts / "texts.yml").write_text(TEXTS.replace(*change))
    assert said in refused("route", "transfer", "texts.yml", "out", "--quiet")


def test_an_adapter_of_another_encoder_is_refused(cli, refused, texts):
    cli("route", "transfer", "texts.yml", "out", "--quiet")
    tiny_model.save(texts / "lm", seed=1)
    told = TEXTS.replace("data: topics.jsonl", "adapter: out/sources/topics.safetensors")
    (texts / "texts.yml").write_text(told)
    assert "other tensors than the model it was made for" in refused(
        "route", "transfer", "texts.yml", "more", "--quiet"
    )


def test_places_that_are_refused(cli, refused, where):
    (where / "notes").mkdir()
    (where / "notes" / "mine.txt").write_text("keep")
    said = refused("route", "transfer", "zoo.yml", "notes", "--overwrite")
    assert "exists and is no transfer" in said
    assert "no such recipe" in refused("route", "transfer", "zo.yml", "out")
    assert "create it" in refused("route", "transfer", "zoo.yml", "away/out")
    assert cli("route", "transfer", "zoo.yml", "out", "--quiet").code == 0
    assert "exists already" in refused("route", "transfer", "zoo.yml", "out")


def test_the_example_and_the_help(cli):
    recipe = recipes.load(ROOT / "examples" / "route" / "transfer.yml")
    assert {recipe.method, *recipe.compare} <= set(METHODS)
    assert "Example: pluribus route transfer" in cli("route", "transfer", "--help").out

"""`pluribus route`: build, explain, evaluate; and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # tests have no package
import tiny_model  # type: ignore[import-not-found]

RECIPE = """zoo: demo8
zoo_sizes: {epochs: 1}
parts: low_rank
parameters: {rank: 4}
router: {kind: linear, epochs: 5, lr: 0.01, batch_size: 64}
limit: 60
"""


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """One cache for all: the zoo is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def where(place, cached, monkeypatch):
    monkeypatch.setenv("PLURIBUS_CACHE", str(cached))
    (place / "route.yml").write_text(RECIPE)
    return place


def test_a_zoo_from_recipe_to_routes(cli, refused, where):
    told = cli("route", "build", "route.yml", "composite", "--json").json
    assert told["parts"][:2] == ["identity", "rot90"]
    assert told["parts_bytes"] < told["base_bytes"] * 8
    assert 0 <= told["router"]["accuracy"] <= 1
    text = cli("route", "explain", "composite", "--limit", "20", "--html", "routes.html").out
    assert [line.split()[0] for line in text.splitlines()[1:]] == told["parts"]
    assert "Mean weight" in (where / "routes.html").read_text()
    one = cli("route", "explain", "composite", "rot90", "--json").json
    assert list(one["groups"]) == ["rot90"]
    assert sum(one["groups"]["rot90"]["chosen"].values()) == one["groups"]["rot90"]["inputs"]
    said = refused("eval", "composite", "--zoo", "demo8", "--limit", "30", "--quiet")
    assert "composite is not of zoo demo8 with seed 0 and the usual sizes" in said


def test_a_composite_is_scored_beside_its_base(cli, where, monkeypatch):
    from pluribus.tasks.zoos import demo8

    full = demo8.build
    monkeypatch.setattr(demo8, "build", lambda *a, **k: full(*a, **{**k, "epochs": 1}))
    (where / "route.yml").write_text(RECIPE.replace("zoo_sizes: {epochs: 1}\n", ""))
    cli("route", "build", "route.yml", "composite", "--quiet")
    cli("zoo", "demo8", "--out", "checkpoints", "--quiet")
    told = cli(
        *("eval", "composite", "base=checkpoints/base.safetensors", "--zoo", "demo8", "--json")
    ).json
    assert told["means"]["composite"]["score"] > told["means"]["base"]["score"]
    assert told["reports"][0]["settings"]["routed"] is True


def test_words_for_people(cli, where):
    told = cli("route", "build", "route.yml", "composite").out.splitlines()
    assert told[0].startswith("composite: 8 parts: identity, rot90")
    assert told[-1].startswith("router: ")


@pytest.fixture
def texts(where):
    """A base, two LoRA adapters and their texts."""
    from pluribus.core.lowrank import save_adapter

    tiny_model.save(where / "lm")
    state = tiny_model.model().state_dict()
    for number, name in enumerate(("maths", "code")):
        torch.manual_seed(number)
        factors = {
            key: (0.3 * torch.randn(2, t.shape[1]), 0.3 * torch.randn(len(t), 2))
            for key, t in state.items()
            if "q_proj" in key or "up_proj" in key
        }
        save_adapter(where / name, factors)
    (where / "maths.txt").write_text("\n".join(f"{i} 34 56 7 8 90 {i}" for i in range(40)))
    (where / "code.txt").write_text("\n".join(f"alarm account blocked {i}" for i in range(40)))
    (where / "lm.yml").write_text(
        "base_model: lm\nparts: adapters\nrouter: {kind: linear, epochs: 30, lr: 0.02, "
        "batch_size: 16}\nmodels:\n- {model: maths, data: maths.txt}\n"
        "- {model: code, data: code.txt}\n"
    )
    return where


def test_language_models_from_recipe_to_scores(cli, texts):
    told = cli("route", "build", "lm.yml", "composite", "--json").json
    assert told["router"]["accuracy"] > 0.9
    found = cli("route", "explain", "composite", "maths.txt", "code.txt", "--json").json
    assert found["groups"]["maths.txt"]["chosen"]["maths"] > 35
    assert found["inputs"][0]["text"] == "0 34 56 7 8 90 0"
    from pluribus.tasks.language import CausalLM

    one = CausalLM.open(str(texts / "composite"))
    questions, choices = ["1 34 56 7 8 90", "alarm account blocked"], [" yes no", " maybe", " no"]
    one.model.top_k = 1
    sharp, _ = one.choice_scores(questions, choices)
    for row, name in enumerate(("maths", "code")):
        alone = CausalLM.open(f"{texts / 'lm'}+{texts / name}")
        expected, _ = alone.choice_scores([questions[row]], choices)
        torch.testing.assert_close(sharp[row], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("parts: low_rank", "parts: lowrank"), "route.yml:3: parts: Input should be 'low_rank'"),
        (("zoo: demo8\n", ""), "route.yml: give a zoo, or base_model and models"),
        (("zoo: demo8", "zoo: demo9"), "no zoo is called 'demo9'"),
        (("{rank: 4}", "{ranks: 4}"), "twin has no parameter 'ranks'"),
        (("{rank: 4}", "{rank: 4, density: 0.1}"), "density and rank are two ways"),
        (("kind: linear", "kind: tree"), "router"),
        (("limit: 60", "limit: 0"), "route.yml:6: limit: Input should be greater than 0"),
        (("limit: 60", "top_k: 9"), "top_k is 9; there are 8 parts"),
        (("parts: low_rank", "merge_method: ties"), "pluribus merge"),
    ],
)
def test_recipes_that_are_refused(refused, where, change, said):
    path = where / "route.yml"
    path.write_text(path.read_text().replace(*change))
    assert said in refused("route", "build", "route.yml", "composite", "--quiet")
    assert not (where / "composite").exists()


def test_places_that_are_refused(cli, refused, where):
    (where / "notes").mkdir()
    (where / "notes" / "mine.txt").write_text("keep")
    assert "exists and is no composite" in refused(
        "route", "build", "route.yml", "notes", "--overwrite"
    )
    assert (where / "notes" / "mine.txt").read_text() == "keep"
    assert "no such recipe" in refused("route", "build", "rout.yml", "composite")
    assert "no composite in it" in refused("route", "explain", "notes")
    assert cli("route", "build", "route.yml", "composite", "--quiet").code == 0
    assert "exists already" in refused("route", "build", "route.yml", "composite")
    assert "has no task 'rot91'" in refused("route", "explain", "composite", "rot91")
    manifest = json.loads((where / "composite" / "routed.json").read_text())
    (where / "composite" / "routed.json").write_text(json.dumps(manifest | {"router": None}))
    assert "has no router" in refused("route", "explain", "composite")

"""Recipes of mixtures: mergekit-moe's run unchanged, and what is refused says why."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
import moe_models
from moe_models import dense, expert, family, loaded, save, told

from pluribus.core.errors import (
    FormatError,
    MismatchError,
    MissingError,
    OutputError,
    PluribusError,
    RecipeError,
)
from pluribus.engine.driver import Options
from pluribus.route import moe
from pluribus.route.moe.layouts import LAYOUTS

ROOT = Path(__file__).parents[2]
SHARED = {"source_model": "llama-base"}


@pytest.fixture
def place(tmp_path):
    family(tmp_path)
    return tmp_path


def assembled(place, recipe, **settings):
    return moe.assemble(moe.of(recipe, folder=place), place / "out", **settings)


def refused(place, recipe, kind, said, **settings):
    before = sorted(place.rglob("*"))
    with pytest.raises(kind) as caught:
        assembled(place, recipe, **settings)
    assert isinstance(caught.value, PluribusError)
    assert said in str(caught.value)
    assert sorted(place.rglob("*")) == before


def changed(number, **changes):
    made = told()
    made["experts"][number] |= changes
    return made


WRONG = {
    "no experts": ({**told(), "experts": []}, "experts: at least one is needed"),
    "too many a token": (told(experts_per_token=3), "experts_per_token is 3, and there are 2"),
    "one expert": ({**told(), "experts": told()["experts"][:1]}, "is 2, and there is 1 expert;"),
    "none a token": (told(experts_per_token=0), "experts_per_token"),
    "no prompts": (changed(1, positive_prompts=None), "llama-1 has no positive_prompts"),
    "no prompts at all": (
        changed(0, positive_prompts=[]) | {"gate_mode": "cheap_embed"},
        "gate_mode cheap_embed is made of prompts",
    ),
    "same prompts": (
        changed(1, positive_prompts=moe_models.PROMPTS[0]),
        "all experts have the same prompts",
    ),
    "no data": (told(gate_mode="trained"), "gate_mode trained learns from data, and llama-0 has"),
    "unknown key": (changed(0, postive_prompts=["a"]), "Did you mean 'positive_prompts'?"),
    "unknown gate": (told(gate_mode="hiden"), "gate_mode"),
    "no such type": (told(dtype="float12"), "unknown element type 'float12'"),
    "noise below 0": (changed(0, noise_scale=-1.0), "noise_scale"),
    "infinite factor": (changed(0, residual_scale=float("inf")), "residual_scale"),
    "some shared prompts": (
        told(shared_experts=[SHARED, {**SHARED, "positive_prompts": ["a"]}]),
        "to all shared experts or to none",
    ),
    "another recipe": ({"merge_method": "ties"}, "run it with: pluribus merge"),
    "no such architecture": (
        told(architecture="olmoe"),
        "architecture 'olmoe': there are deepseek_moe, mixtral, qwen2_moe, qwen3_moe",
    ),
    "qwen2 without shared": (
        told(architecture="qwen2"),
        "qwen2_moe has exactly one shared expert, and shared_experts lists 0",
    ),
    "qwen2, shared without prompts": (
        told(architecture="qwen moe", shared_experts=[SHARED]),
        "has a gate for the shared expert, which needs positive_prompts",
    ),
    "mixtral with shared": (
        told(architecture="mixtral", shared_experts=[SHARED]),
        "mixtral has no shared experts",
    ),
    "deepseek, shared with prompts": (
        told(architecture="deepseek", shared_experts=[{**SHARED, "positive_prompts": ["a"]}]),
        "takes no prompts for one",
    ),
    "of another base": (told(architecture="qwen3"), "qwen3_moe is made of qwen3, not llama"),
    "two gated shared": (
        told(shared_experts=[{**SHARED, "positive_prompts": ["a"]}] * 2),
        "composites: see `pluribus route build`",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_recipes_that_are_refused(name, place):
    recipe, said = WRONG[name]
    refused(place, recipe, RecipeError, said)


def test_prompts_are_not_asked_for_where_they_are_not_used(place):
    bare = told(gate_mode="uniform_random")
    for entry in bare["experts"]:
        del entry["positive_prompts"]
    assert assembled(place, bare).experts[0]["positive_prompts"] == 0


@pytest.mark.parametrize(
    ("changes", "shared", "expected"),
    [
        ({}, None, "mixtral"),
        ({}, [SHARED], "deepseek_moe"),
        ({}, [{**SHARED, "positive_prompts": ["a"]}], "qwen2_moe"),
        ({"architecture": "Mixtral"}, None, "mixtral"),
        ({"architecture": "DeepSeek"}, None, "deepseek_moe"),
        ({"architecture": "granitemoeshared"}, [SHARED, SHARED], "deepseek_moe"),
    ],
)
def test_what_fits_is_chosen(changes, shared, expected, place):
    recipe = told(**changes, **({"shared_experts": shared} if shared else {}))
    assert assembled(place, recipe).architecture == expected


def test_every_layout_says_what_it_is():
    assert list(LAYOUTS) == ["deepseek_moe", "mixtral", "qwen2_moe", "qwen3_moe"]
    for name in LAYOUTS:
        assert LAYOUTS[name].__pluribus_layout__.name == name
        assert LAYOUTS[name].__doc__


# -- models that do not fit ------------------------------------------------------------------------


def test_experts_of_another_make_are_refused(place):
    save(dense("qwen3"), place / "llama-1")
    refused(place, told(), MismatchError, "llama-1 is of type 'qwen3', and the base llama-base of")
    save(dense(intermediate_size=40), place / "llama-1")
    refused(place, told(), MismatchError, "down_proj.weight is [32, 40], and [32, 48] in the base")
    save(dense(num_hidden_layers=1), place / "llama-1")
    refused(place, told(), MismatchError, "layers.1.mlp.down_proj.weight is no such tensor")
    save(dense(num_hidden_layers=3), place / "llama-1")
    refused(place, told(), MismatchError, "num_hidden_layers is 3, and 2 in the base")
    save(dense(hidden_act="gelu"), place / "llama-1")
    refused(place, told(), MismatchError, "hidden_act is gelu, and silu in the base")


def test_other_dense_models_are_refused_with_what_there_is(place):
    config = json.loads((place / "llama-base" / "config.json").read_text())
    for values, said in (
        ({"model_type": "phi3"}, "is of type 'phi3'; mixtures are assembled from dense llama"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "is a mixture of experts already"),
    ):
        (place / "llama-base" / "config.json").write_text(json.dumps(config | values))
        refused(place, told(), MismatchError, said)
        refused(place, told(), MismatchError, "pluribus route build")
    (place / "llama-base" / "config.json").unlink()
    refused(place, told(), MissingError, "no config.json beside the tensors")


def test_tensors_without_a_place_are_refused(place):
    save(dense(attention_bias=True), place / "llama-base")
    refused(place, told(architecture="mixtral"), RecipeError, "mixtral has no attention biases")
    found = moe.assemble(moe.of(told(), folder=place), place / "biased")
    assert found.architecture == "deepseek_moe"
    save(dense(mlp_bias=True), place / "llama-base")
    refused(place, told(), MismatchError, "mlp.down_proj.bias is [32], and a mixture's expert has")


def test_vocabularies(place):
    path = place / "llama-1" / "tokenizer.json"
    whole = json.loads(path.read_text())
    vocab = whole["model"]["vocab"]
    one, other = (token for token, index in vocab.items() if index in (300, 301))
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(whole))
    refused(place, told(), MismatchError, "llama-1 has another vocabulary than the base llama-base")
    vocab[one], vocab[other] = vocab[other], vocab[one]
    mark = {"id": 330, "content": "<|im_end|>", "special": True, "normalized": False}
    mark |= {"single_word": False, "lstrip": False, "rstrip": False}
    whole["added_tokens"].append(mark)
    path.write_text(json.dumps(whole))
    assert "llama-1 has 1 tokens beyond the base's" in assembled(place, told()).warnings[0]


def test_damaged_and_missing_models(place):
    weights = place / "llama-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(place, told(), FormatError, "model.safetensors")
    weights.unlink()
    refused(place, told(), MissingError, "llama-1")
    refused(place, changed(0, source_model="llama-8"), MissingError, "llama-8: no such file")
    (place / "llama-base" / "tokenizer.json").unlink()
    (place / "llama-base" / "tokenizer_config.json").unlink()
    save(dense(), place / "llama-1")
    refused(place, told(gate_mode="cheap_embed"), PluribusError, "llama-base: no tokenizer")


def test_places_that_are_taken(place):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("keep")
    refused(place, told(), OutputError, "exists already")
    more = Options(overwrite=True)
    refused(place, told(), OutputError, "other things than a model", options=more)
    recipe = moe.of(told(), folder=place)
    with pytest.raises(OutputError, match="is read from there"):
        moe.assemble(recipe, place / "llama-1", options=more)
    with pytest.raises(OutputError, match="no such folder"):
        moe.assemble(recipe, place / "no" / "out")
    with pytest.raises(OutputError, match="name a folder"):
        moe.assemble(recipe, place / "out.safetensors")
    moe.assemble(recipe, place / "fine")
    first = (place / "fine" / "model.safetensors").read_bytes()
    other = moe.of(told(gate_mode="random"), folder=place)
    moe.assemble(other, place / "fine", options=more)
    assert (place / "fine" / "model.safetensors").read_bytes() != first
    assert sorted(p.name for p in place.glob("*fine*")) == ["fine"]


def test_a_lora_expert_is_base_plus_adapter(place):
    from pluribus.core.lowrank import save_adapter

    torch.manual_seed(3)
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = torch.randn(2, 32), torch.randn(48, 2)
    save_adapter(place / "lora", {name: (a, b)})
    assembled(place, changed(1, source_model="llama-0+lora"))
    model = loaded(place / "out")
    own = expert(dense(), 1).model.layers[1].mlp.up_proj.weight
    up = model.model.layers[1].mlp.experts.gate_up_proj[1, 48:]
    torch.testing.assert_close(up, own + b @ a)


# -- files -----------------------------------------------------------------------------------------


def test_paths_are_beside_the_recipe(place, tmp_path, monkeypatch):
    (place / "moe.yml").write_text(yaml.safe_dump(told()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moe.assemble(moe.load(place / "moe.yml"), "out")
    loaded(tmp_path / "elsewhere" / "out")


def test_faults_name_their_line(place):
    path = place / "moe.yml"
    path.write_text("base_model: b\ngate_mode: hidden\nexperts:\n- {source_model: x}\ndtype: 3\n")
    with pytest.raises(RecipeError, match=r"moe.yml:5: dtype"):
        moe.load(path)
    with pytest.raises(RecipeError, match="a mixture of experts is keys with values"):
        moe.of(["a"])
    with pytest.raises(MissingError, match="no such recipe"):
        moe.load(place / "mo.yml")


def test_the_documentation_s_recipes_are_read():
    import re

    assert moe.load(ROOT / "examples" / "route" / "moe.yml").experts
    page = (ROOT / "docs" / "moe.md").read_text("utf-8")
    found = re.findall(r"^```yml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(found) >= 2
    for text in found:
        assert moe.of(yaml.safe_load(text)).experts

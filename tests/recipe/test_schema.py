"""The schema: unknown keys at every level, messages with lines, references, round trips."""

import pytest

from pluribus.core.errors import RecipeError
from pluribus.recipe import Recipe, load
from pluribus.recipe.text import documents

PLAIN = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def read(text: str, **keywords) -> Recipe:
    return Recipe.of(documents(text, "r.yml")[0], where="r.yml", **keywords)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_metod: ties\nmodels: [{model: a}]", "r.yml:1: merge_metod: .*'merge_method'"),
        ("merge_method: ties\nmodels:\n  - modle: a", r"r.yml:3: models\[0\].modle: .*'model'"),
        (
            "merge_method: ties\nmodels:\n  - model: a\n    weight: 0.5",
            r"r.yml:4: models\[0\].weight: .*weight is a parameter: write it under",
        ),
        (
            "merge_method: ties\nslices:\n- sources:\n  - {model: a, layer_rang: [0, 1]}",
            r"r.yml:4: slices\[0\].sources\[0\].layer_rang: .*'layer_range'",
        ),
        (
            "merge_method: ties\nslices:\n- source:\n  - {model: a}",
            r"r.yml:3: slices\[0\].source: .*'sources'",
        ),
        (
            "merge_method: ties\nmodules:\n  text: {model: [{model: a}]}",
            "r.yml:3: modules.text.model: .*'models'",
        ),
        (
            "merge_method: ties\nmodels: [{model: a}]\ntokenizer:\n  sorce: union",
            "r.yml:4: tokenizer.sorce: .*'source'",
        ),
        (
            "merge_method: ties\nmodels: [{model: a}]\ntokenizer:\n  tokens:\n    x: {forse: true}",
            "r.yml:5: tokenizer.tokens.x.forse: .*'force'",
        ),
        (
            "merge_method: ties\nmodels: [{model: a}]\nparameters:\n  t: [{filtr: a, value: 1}]",
            "r.yml:4: parameters.t: .*'filter'",
        ),
    ],
)
def test_unknown_key_names_line_and_neighbour(text, message):
    with pytest.raises(RecipeError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{model: a}]", "merge_method is missing"),
        ("merge_method: ties", "exactly one of models, slices and modules"),
        ("merge_method: ties\nmodels: [{model: a}]\nslices: []", "slices"),
        (
            "merge_method: ties\nmodels: [{model: a}]\nslices: [{sources: [{model: a}]}]",
            "models and slices are given",
        ),
        ("merge_method: ties\nmodels: []", "models"),
        ("merge_method: ties\nmodels: [{parameters: {}}]", r"models\[0\]: model is missing"),
        ("merge_method: ties\nmodels: [{model: ''}]", "empty model name"),
        (
            "merge_method: ties\nslices: [{sources: [{model: a, layer_range: [3, 3]}]}]",
            r"layer_range \[3, 3\]",
        ),
        (
            "merge_method: ties\nslices: [{sources: [{model: a, layer_range: [0]}]}]",
            "layer_range",
        ),
        ("merge_method: ties\nmodels: [{model: a}]\ndtype: float17", "float17.*Did you mean"),
        ("merge_method: ties\nmodels: [{model: a}]\ndtype: int8", "not a floating-point type"),
        ("merge_method: ties\nmodels: [{model: a}]\nseed: -1", "seed"),
        ("merge_method: ties\nmodels: [{model: a}]\nname: ../up", "folder's name"),
        (
            "merge_method: ties\nmodels: [{model: a}]\nround_inputs: true",
            "round_inputs needs dtype",
        ),
        (
            "merge_method: ties\nmodels: [{model: a}]\ntokenizer: {}\ntokenizer_source: union",
            "both given",
        ),
        ("merge_method: ties\nmodels: [{model: a}]\nparameters: [1]", "names with their values"),
        (
            "merge_method: ties\nmodules:\n  a: {models: [{model: a}], slices: [{sources: "
            "[{model: a}]}]}",
            "either models or slices",
        ),
        ("- a", "a recipe is keys with values, not list"),
    ],
)
def test_what_is_no_recipe(text, message):
    with pytest.raises(RecipeError, match=message):
        read(text)


def test_lenient_ignores_unknown_keys_and_says_so():
    text = (
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}, junk: 2}\n"
        "extra: {x: 1}\ntokenizer: {source: union, padd: 3}\n"
    )
    recipe = read(text, lenient=True)
    assert recipe.models[0].parameters == {"weight": 1}
    assert len(recipe.notes) == 3
    assert any("r.yml:3: models[0].junk" in note for note in recipe.notes)
    with pytest.raises(RecipeError, match="merge_method is missing"):
        read("models: [{model: a}]\njunk: 1", lenient=True)


def test_lenient_leaves_the_callers_values_alone():
    value = {**PLAIN, "junk": 1}
    Recipe.of(value, lenient=True)
    assert value["junk"] == 1


def test_references_as_text_and_as_mappings(tmp_path):
    (tmp_path / "odd+name@1").mkdir()
    recipe = Recipe.of(
        {
            "merge_method": "linear",
            "models": [
                {"model": "odd+name@1"},
                {"model": "org/repo@main+other/lora"},
                {"model": {"model": {"path": "p", "revision": None}, "lora": None}},
                {"model": {"model": "q", "override_architecture": "LlamaForCausalLM"}},
            ],
        },
        folder=tmp_path,
    )
    first, second, third, fourth = recipe.references
    assert first.model.path == "odd+name@1"
    assert first.lora is None
    assert (second.model.path, second.model.revision) == ("org/repo", "main")
    assert second.lora.path == "other/lora"
    assert third.model.path == "p"
    assert fourth.override_architecture == "LlamaForCausalLM"


FULL = """
merge_method: ties
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [0, 1]}}
      - {model: b+l, layer_range: [1, 3]}
    base_model: c
    residual_weight: 0.1
    parameters: {density: [{filter: mlp, value: 0.5}, {value: 0.25}]}
base_model: c
parameters: {lambda: 0.5, normalize: true}
dtype: float32
out_dtype: bfloat16
tokenizer:
  source: union
  tokens:
    <x>: {source: {kind: model_token, model: a, token: <s>}, force: true}
    <y>: {source: {kind: zero}}
    <z>: {source: a}
  pad_to_multiple_of: 8
chat_template: chatml
name: one
seed: 3
gradient_tail: last
round_inputs: true
allow_crimes: true
"""


def test_yaml_and_back(tmp_path):
    recipe = read(FULL)
    (tmp_path / "again.yml").write_text(recipe.to_yaml())
    (again,) = load(tmp_path / "again.yml")
    assert again.plain() == recipe.plain()
    assert again.to_yaml() == recipe.to_yaml()


def test_seed_depends_on_the_recipe_but_not_on_its_name():
    one = Recipe.of(PLAIN)
    assert one.drawn_seed == Recipe.of({**PLAIN, "name": "x"}).drawn_seed
    assert one.drawn_seed != Recipe.of({**PLAIN, "dtype": "float16"}).drawn_seed
    assert Recipe.of({**PLAIN, "seed": 5}).drawn_seed == 5

"""From recipe to plan: parameters per tensor, the base, configurations, types, errors."""

import json

import numpy as np
import pytest
import tiny
from asking import jobs, layer, models, recipe

from pluribus.core.errors import InputError, MismatchError, RecipeError
from pluribus.core.weights import Weights
from pluribus.merge.ties import Ties
from pluribus.recipe import describe, plan, run

# -- parameters ------------------------------------------------------------------------------------


def test_gradient_over_four_layers_and_outside(root):
    found = jobs(
        root,
        merge_method="slerp",
        base_model="a",
        models=models("b"),
        parameters={"t": [{"filter": "mlp", "value": [0, 0.9]}, {"value": [0.2, 0.4]}]},
    )
    assert [found[layer(k)].merger.t for k in range(4)] == pytest.approx([0, 0.3, 0.6, 0.9])
    assert found[layer(3, "input_layernorm")].merger.t == 0.4
    assert found["model.embed_tokens.weight"].merger.t == 0.2
    assert found["lm_head.weight"].merger.t == 0.2  # mergekit's: t = 0 after the layers too


def test_gradient_tail_last(root):
    found = jobs(
        root,
        merge_method="slerp",
        base_model="a",
        models=models("b"),
        parameters={"t": [0.2, 0.4]},
        gradient_tail="last",
    )
    assert found["model.embed_tokens.weight"].merger.t == 0.2
    assert found["model.norm.weight"].merger.t == 0.4
    assert found["lm_head.weight"].merger.t == 0.4


def test_per_expert_values_are_tuples_in_order(root):
    found = jobs(
        root,
        merge_method="ties",
        base_model="a",
        models=[
            {"model": "b", "parameters": {"density": [1, 0.7, 0.1], "weight": 1}},
            {"model": "c", "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
        ],
        parameters={"lambda": 0.5, "normalize": True},
    )
    assert found[layer(0)].merger == Ties(density=(1, 0.5), weight=(1, 0), scale=0.5)
    assert found[layer(1)].merger.density == pytest.approx((0.8, 0.5))
    assert found[layer(1)].merger.weight == pytest.approx((1, 0.3))
    assert found[layer(3)].merger.weight == 1.0  # equal for all: one value
    assert found[layer(0)].labels == ("a", "b", "c")


def test_base_is_where_the_recipe_says_not_first(root):
    found = jobs(root, merge_method="ties", base_model="b", models=models("a", "b", "c"))
    job = found[layer(0)]
    assert job.labels == ("b", "a", "c")
    assert job.base is not None
    assert len(job.experts) == 2


def test_precedence_source_slice_module_recipe(root):
    def weights(source, slice_, module, whole):
        given = {
            "merge_method": "linear",
            "modules": {
                "default": {
                    "slices": [
                        {
                            "sources": [
                                {"model": "a", "layer_range": [0, 4], "parameters": source},
                                {"model": "b", "layer_range": [0, 4]},
                            ],
                            "parameters": slice_,
                        }
                    ],
                    "parameters": module,
                }
            },
            "parameters": whole,
        }
        return jobs(root, **given)[layer(0)].merger.weight

    one, two, three, four = ({"weight": w} for w in (0.1, 0.2, 0.3, 0.4))
    assert weights(one, two, three, four) == (0.1, 0.2)
    assert weights({}, two, three, four) == 0.2
    assert weights({}, {}, three, four) == 0.3
    assert weights(one, {}, {}, four) == (0.1, 0.4)
    assert weights(one, {}, {}, {}) == (0.1, 1.0)  # the field's default
    elsewhere = {"weight": [{"filter": "norm", "value": 9}]}
    assert weights(elsewhere, two, three, four) == 0.2


def test_filters_see_the_input_name_for_models_and_the_output_name_for_shared(root):
    found = jobs(
        root,
        merge_method="linear",
        slices=[
            {
                "sources": [
                    {
                        "model": "a",
                        "layer_range": [2, 4],
                        "parameters": {
                            "weight": [{"filter": "layers.2.", "value": 5}, {"value": 1}]
                        },
                    },
                    {"model": "b", "layer_range": [0, 2]},
                ]
            }
        ],
        parameters={"normalize": [{"filter": "layers.0.", "value": False}, {"value": True}]},
    )
    assert found[layer(0)].merger.weight == (5, 1)
    assert found[layer(1)].merger.weight == 1
    assert found[layer(0)].merger.normalize is False
    assert found[layer(1)].merger.normalize is True


def test_one_merger_for_equal_parameters(root):
    found = jobs(root, merge_method="linear", models=models("a", "b", weight=0.5))
    assert len({id(job.merger) for job in found.values()}) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parameters": {"densty": 0.1}}, "no parameter 'densty'.*Did you mean 'density'"),
        ({"models": models("b", densty=1)}, "parameters of b: ties has no parameter 'densty'"),
        ({"models": models("b", normalize=True)}, "one value for all models; move it"),
        ({"models": models("b", density=1.5)}, "density = 1.5"),
        ({"parameters": {"weight": "heavy"}}, "'heavy' is not a number"),
        ({"merge_method": "tise"}, "Did you mean 'ties'"),
        ({"merge_method": "slerp"}, "slerp needs t"),
        ({"base_model": None}, "ties needs a base model"),
        ({"models": models("b", "b")}, "b is given twice"),
        (
            {"merge_method": "slerp", "models": models("b", "c"), "parameters": {"t": 0.5}},
            "takes 1",
        ),
    ],
)
def test_parameters_that_cannot_be(root, values, message):
    given = {"merge_method": "ties", "base_model": "a", "models": models("b"), **values}
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        jobs(root, **given)


def test_a_missing_setting_names_tensor_and_model(root):
    with pytest.raises(RecipeError, match=r"t, and no setting of it holds for tensor 'model\.e"):
        jobs(
            root,
            merge_method="slerp",
            base_model="a",
            models=models("b"),
            parameters={"t": [{"filter": "mlp", "value": 1}]},
        )


def test_parameters_of_the_base_are_not_used(root):
    (planned,) = plan(
        recipe(
            root,
            merge_method="ties",
            base_model="a",
            models=[*models("a", weight=3), *models("b", weight=2)],
        )
    )
    assert planned.plan.jobs[0].merger.weight == 2
    assert any("it is the base" in note for note in planned.warnings)


def test_a_chain_holds_its_own_parameters(root):
    text = "trim(density=0.5) >> elect() >> mean() >> scale(by=0.5)"
    text = text.replace("scale(by=0.5)", "lines(beta=0.8)")
    found = jobs(root, merge_method=text, base_model="a", models=models("b", "c"))
    assert str(found[layer(0)].merger).startswith("trim(density=0.5) >> elect")
    assert found[layer(3)].layer == 3
    with pytest.raises(RecipeError, match="stand inside it"):
        jobs(
            root,
            merge_method=text,
            base_model="a",
            models=models("b", "c"),
            parameters={"density": 1},
        )


def test_whole_model_methods_share_what_their_folds_depend_on(root):
    given = {"merge_method": "ties", "base_model": "a", "models": models("b", "c")}
    whole = {"scope": "model", "weight": [0.1, 1]}
    assert jobs(root, **given, parameters=whole)
    with pytest.raises(RecipeError, match="density cannot differ between tensors"):
        jobs(root, **given, parameters={"scope": "model", "density": [0.1, 1]})


def test_extras_reach_the_method(root):
    given = {
        "merge_method": "fisher",
        "models": [
            {"model": "a", "extras": {"fisher": "b"}},
            {"model": "b", "extras": {"fisher": "c"}},
        ],
    }
    job = jobs(root, **given)[layer(1)]
    assert [s.path for s in job.extras["fisher"]] == [
        str(root / n / "model.safetensors") for n in "bc"
    ]
    del given["models"][1]["extras"]
    with pytest.raises(RecipeError, match="fisher needs 'fisher' of every model, and b has none"):
        jobs(root, **given)


# -- base ------------------------------------------------------------------------------------------


def test_base_is_added_where_it_is_not_listed(root):
    listed = jobs(root, merge_method="ties", base_model="a", models=models("a", "b", "c"))
    added = jobs(root, merge_method="ties", base_model="a", models=models("b", "c"))
    sliced = jobs(
        root,
        merge_method="ties",
        base_model="a",
        slices=[{"sources": [{"model": n, "layer_range": [0, 4]} for n in "bc"]}],
    )
    for name, job in listed.items():
        for other in (added[name], sliced[name]):
            assert other.labels == job.labels
            assert [s.identity for s in other.sources] == [s.identity for s in job.sources]


def test_the_slices_base_takes_the_same_layers_or_must_be_listed(root):
    found = jobs(
        root,
        merge_method="ties",
        base_model="a",
        slices=[{"sources": [{"model": "b", "layer_range": [1, 3]}]}],
    )
    assert len([n for n in found if "up_proj" in n]) == 2
    base = Weights.open(root / "a")
    assert found[layer(0)].base.identity == base.source(layer(1)).identity
    with pytest.raises(RecipeError, match="which layers of the base a belong here"):
        jobs(
            root,
            merge_method="ties",
            base_model="a",
            slices=[
                {
                    "sources": [
                        {"model": "b", "layer_range": [1, 3]},
                        {"model": "c", "layer_range": [0, 2]},
                    ]
                }
            ],
        )


def test_a_method_without_base_takes_a_listed_base_as_an_input(root):
    found = jobs(root, merge_method="linear", base_model="a", models=models("a", "b"))
    assert found[layer(0)].labels == ("a", "b")
    (planned,) = plan(recipe(root, merge_method="linear", base_model="a", models=models("b", "c")))
    assert planned.plan.jobs[0].labels == ("b", "c")
    assert planned.plan.carry == root / "a"
    assert any("lends the output only its configuration" in note for note in planned.warnings)


# -- configuration, types, pre-flight --------------------------------------------------------------


def test_different_architectures_need_a_word(root):
    given = {"merge_method": "linear", "models": models("a", "mistral")}
    with pytest.raises(RecipeError, match="mistral is MistralForCausalLM, but a is LlamaFor"):
        jobs(root, **given)
    assert jobs(root, **given, allow_crimes=True)
    assert plan(recipe(root, **given), allow_crimes=True)


def test_configurations_that_differ_are_reported(tmp_path):
    tiny.model(tmp_path / "x", seed=1)
    tiny.model(tmp_path / "y", seed=2, config={"rope_theta": 5e5, "hidden_act": "gelu"})
    (planned,) = plan(recipe(tmp_path, merge_method="linear", models=models("x", "y")))
    told = " ".join(planned.warnings)
    assert "y has rope_theta = 500000.0, but x has 10000.0" in told
    assert "hidden_act" in told


def test_bare_files_and_folders(root):
    found = jobs(root, merge_method="linear", models=models("bare.safetensors", "a"))
    assert len(found) == 39


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, "F32"),
        ({"dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float32", "out_dtype": "float16"}, "F16"),
        ({"dtype": "float64", "out_dtype": "float32"}, "F32"),
    ],
)
def test_output_types(root, given, stored):
    found = jobs(root, merge_method="linear", models=models("a", "b"), **given)
    job = found[layer(0)]
    assert job.spec.dtype == stored
    assert job.wide is (np.float64 if given.get("dtype") == "float64" else np.float32)


def test_round_inputs(root):
    given = {"merge_method": "passthrough", "models": models("a"), "out_dtype": "float32"}
    rounded = run(recipe(root, **given, dtype="bfloat16", round_inputs=True), None).weights
    plain = run(recipe(root, **given, dtype="bfloat16"), None).weights
    a = Weights.open(root / "a")
    assert np.array_equal(plain.source(layer(0)).floats(), a.source(layer(0)).floats())
    assert not np.array_equal(rounded.source(layer(0)).floats(), a.source(layer(0)).floats())


def test_missing_tensors_are_listed_for_every_model(tmp_path):
    whole = tiny.tensors(2, 14, 0)
    tiny.save(tmp_path / "x.safetensors", whole)
    less = {n: v for n, v in whole.items() if "q_proj" not in n}
    tiny.save(tmp_path / "y.safetensors", less)
    more = {**whole, "model.extra.weight": whole["model.norm.weight"]}
    tiny.save(tmp_path / "z.safetensors", more)
    names = [f"{n}.safetensors" for n in "xyz"]
    with pytest.raises(MismatchError) as error:
        jobs(tmp_path, merge_method="linear", models=models(*names))
    assert "y.safetensors lacks model.extra.weight" in str(error.value)
    assert "model.layers.0.self_attn.q_proj.weight" in str(error.value)
    assert "x.safetensors lacks model.extra.weight" in str(error.value)


def test_derived_buffers_may_be_missing(tmp_path):
    whole = tiny.tensors(2, 14, 0)
    tiny.save(tmp_path / "x.safetensors", whole)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    tiny.save(tmp_path / "y.safetensors", {**whole, **buffer})
    names = ("x.safetensors", "y.safetensors")
    (planned,) = plan(recipe(tmp_path, merge_method="linear", models=models(*names)))
    assert set(planned.plan.specs) == set(whole)
    assert any("rotary_emb.inv_freq are left out" in note for note in planned.warnings)


def test_shapes_that_differ(tmp_path):
    whole = tiny.tensors(1, 14, 0)
    tiny.save(tmp_path / "x.safetensors", whole)
    whole[layer(0)] = whole[layer(0)][:3]
    tiny.save(tmp_path / "y.safetensors", whole)
    with pytest.raises(MismatchError, match=r"up_proj.*F32\[24, 16\] in x.*F32\[3, 16\] in y"):
        jobs(tmp_path, merge_method="linear", models=models("x.safetensors", "y.safetensors"))


def test_nothing_to_merge(tmp_path):
    from pluribus.core.source import ArraySource

    Weights({"n": ArraySource.of(np.arange(3), "I64")}).save(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="nothing to merge"):
        jobs(tmp_path, merge_method="passthrough", models=models("x.safetensors"))


def test_description_holds_what_the_plan_is(root):
    (planned,) = plan(
        recipe(root, merge_method="ties", base_model="a", models=models("b", "c", density=[0.5, 1]))
    )
    told = describe(planned)
    assert json.loads(json.dumps(told)) == told
    assert told["tensors"] == 39
    assert told["layers"] == 4
    assert told["bytes_written"] == told["elements"] * 4
    assert told["bytes_read"] == sum(told["bytes_read_per_pass"])
    by_layer = {entry["layer"]: entry["parameters"]["density"] for entry in told["parameters"]}
    assert by_layer == pytest.approx({None: 0.5, 0: 0.5, 1: 2 / 3, 2: 5 / 6, 3: 1.0})

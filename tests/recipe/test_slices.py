"""From recipe to plan: slices of layers, and modules of several families."""

import json

import numpy as np
import pytest
import tiny
from asking import jobs, layer, models, recipe

from pluribus.core.errors import RecipeError
from pluribus.core.weights import Weights
from pluribus.recipe import plan, run

# -- slices ----------------------------------------------------------------------------------------

STACK = [
    {"sources": [{"model": "a", "layer_range": [0, 3]}]},
    {"sources": [{"model": "b", "layer_range": [1, 4]}]},
]


def test_stack_four_layers_to_six(root, tmp_path):
    run(recipe(root, merge_method="passthrough", slices=STACK), tmp_path / "out")
    out = tiny.arrays(Weights.open(tmp_path / "out"))
    a, b = (tiny.arrays(Weights.open(root / n)) for n in "ab")
    assert set(out) == set(tiny.shapes(6, 14))
    for k, (model, source) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for rest in (*tiny.LINEARS, *tiny.NORMS):
            assert np.array_equal(out[layer(k, rest)], model[layer(source, rest)])
    assert np.array_equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert np.array_equal(out["model.norm.weight"], b["model.norm.weight"])
    assert np.array_equal(out["lm_head.weight"], b["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6


def test_per_layer_lists_of_the_configuration_follow(root, tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    more = {
        "layer_types": kinds,
        "mlp_only_layers": [1, 3],
        "max_window_layers": 4,
        "eos_token_id": [1, 2, 3, 4],
    }
    tiny.model(tmp_path / "x", seed=1, config=more)
    tiny.model(tmp_path / "y", seed=2, config=more | {"layer_types": ["other"] * 4})
    slices = [
        {"sources": [{"model": "x", "layer_range": [0, 3]}]},
        {"sources": [{"model": "y", "layer_range": [1, 4]}]},
    ]
    (planned,) = plan(recipe(tmp_path, merge_method="passthrough", slices=slices))
    config = json.loads(planned.files["config.json"])
    assert config["layer_types"] == [*kinds[:3], "other", "other", "other"]
    assert config["mlp_only_layers"] == [1, 3, 5]
    assert config["num_hidden_layers"] == config["max_window_layers"] == 6
    assert config["eos_token_id"] == [1, 2, 3, 4]


def test_nested_configurations_and_other_names_of_the_layer_count(tmp_path):
    nested = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}
    tiny.model(tmp_path / "n", config=nested | {"num_hidden_layers": None, "n_layer": 4})
    slices = [{"sources": [{"model": "n", "layer_range": [0, 2]}]}] * 1
    (planned,) = plan(recipe(tmp_path, merge_method="passthrough", slices=slices))
    config = json.loads(planned.files["config.json"])
    assert config["text_config"]["num_hidden_layers"] == 2
    assert config["vision_config"]["num_hidden_layers"] == 4
    assert config["n_layer"] == 2


def test_one_layer_has_t_one(root):
    found = jobs(
        root,
        merge_method="slerp",
        base_model="a",
        slices=[
            {
                "sources": [
                    {"model": "a", "layer_range": [1, 2]},
                    {"model": "b", "layer_range": [2, 3]},
                ]
            }
        ],
        parameters={"t": [0.1, 0.9]},
    )
    assert found[layer(0)].merger.t == 0.9
    assert found["lm_head.weight"].merger.t == 0.1


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([{"sources": [{"model": "a", "layer_range": [2, 5]}]}], "which has 4 layers"),
        (
            [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 2]},
                        {"model": "b", "layer_range": [0, 3]},
                    ]
                }
            ],
            "different numbers of layers",
        ),
    ],
)
def test_ranges_that_do_not_fit(root, slices, message):
    with pytest.raises(RecipeError, match=message):
        jobs(root, merge_method="linear", slices=slices)


def test_models_of_different_depth(root):
    with pytest.raises(RecipeError, match=r"different numbers of layers.*deep \[0, 6\]"):
        jobs(root, merge_method="linear", models=models("a", "deep"))


# -- modules ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a folder of two encoder-decoder models with a head outside both."""
    root = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        names = ["shared.weight", "lm_head.weight", "decoder.final_layer_norm.weight"]
        for part in ("encoder", "decoder"):
            for k in range(3):
                names += [
                    f"{part}.block.{k}.layer.0.q.weight",
                    f"{part}.block.{k}.layer.1.w.weight",
                ]
        (root / name).mkdir()
        tiny.save(
            root / name / "model.safetensors",
            {n: rng.standard_normal((4, 4)).astype(np.float32) for n in names},
        )
        config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3, "vocab_size": 4}
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def test_models_of_two_families_have_each_their_own_gradient(pair):
    found = jobs(
        pair,
        merge_method="slerp",
        base_model="a",
        models=models("b"),
        parameters={"t": [0, 1]},
    )
    for part in ("encoder", "decoder"):
        got = [found[f"{part}.block.{k}.layer.0.q.weight"].merger.t for k in range(3)]
        assert got == [0, 0.5, 1]


def test_slices_of_one_module_and_models_of_another(pair):
    (planned,) = plan(
        recipe(
            pair,
            merge_method="passthrough",
            modules={
                "encoder": {"models": models("a")},
                "decoder": {
                    "slices": [
                        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
                        {"sources": [{"model": "b", "layer_range": [0, 3]}]},
                    ]
                },
                "default": {"models": models("b")},
            },
        )
    )
    found = {job.name: job.labels for job in planned.plan.jobs}
    assert len(found) == 6 + 10 + 3
    assert found["decoder.block.1.layer.0.q.weight"] == ("a",)
    assert found["decoder.block.4.layer.0.q.weight"] == ("b",)
    assert found["decoder.final_layer_norm.weight"] == ("b",)  # follows the layers: last slice
    assert found["shared.weight"] == ("b",)
    config = json.loads(planned.files["config.json"])
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 5)


def test_slices_need_modules_if_there_are_two_families(pair):
    with pytest.raises(RecipeError, match=r"2 families of layers.*name each in modules"):
        jobs(
            pair,
            merge_method="passthrough",
            slices=[{"sources": [{"model": "a", "layer_range": [0, 2]}]}],
        )


def test_modules_that_leave_tensors_out(pair):
    with pytest.raises(RecipeError, match=r"decoder\.block belong to no module"):
        jobs(pair, merge_method="linear", modules={"encoder": {"models": models("a", "b")}})
    with pytest.raises(RecipeError, match=r"no tensor lies in a module called 'enc'.*'encoder"):
        jobs(pair, merge_method="linear", modules={"enc": {"models": models("a", "b")}})


def test_loose_tensors_go_with_the_largest_module(pair):
    both = {part: {"models": models("a", "b")} for part in ("encoder", "decoder")}
    assert "shared.weight" in jobs(pair, merge_method="linear", modules=both)

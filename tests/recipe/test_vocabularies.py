"""From recipe to plan: vocabularies that differ, and heads that are tied or shared."""

import json

import pytest
import tiny
from asking import jobs, models, recipe

from pluribus.core.errors import MismatchError, RecipeError
from pluribus.core.weights import Weights
from pluribus.recipe import plan, run

# -- vocabularies and heads ------------------------------------------------------------------------


def test_different_vocabularies_without_a_tokenizer_setting(root):
    with pytest.raises(MismatchError, match="Add 'tokenizer_source: union'"):
        jobs(root, merge_method="linear", models=models("a", "wide"))


def test_union_of_vocabularies(root, tmp_path):
    given = {
        "merge_method": "linear",
        "base_model": "a",
        "models": models("a", "wide", weight=0.5),
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
        "chat_template": "chatml",
        "dtype": "bfloat16",
    }
    run(recipe(root, **given), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 16
    assert config["torch_dtype"] == "bfloat16"
    spec = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert spec["model"]["vocab"]["more"] == 14
    assert "im_start" in (tmp_path / "out" / "chat_template.jinja").read_text()
    out = Weights.open(tmp_path / "out")
    assert out.source("lm_head.weight").spec.shape == (16, tiny.HIDDEN)


def test_base_vocabulary_drops_rows(root):
    found = jobs(
        root,
        merge_method="linear",
        base_model="a",
        models=models("a", "wide"),
        tokenizer_source="base",
    )
    assert found["lm_head.weight"].spec.shape[0] == 14


def test_tokenizer_of_a_bare_file(root):
    with pytest.raises(RecipeError, match="bare file without a tokenizer"):
        jobs(
            root,
            merge_method="linear",
            models=models("a", "bare.safetensors"),
            tokenizer_source="union",
        )


def test_a_tied_head_beside_one_that_is_not(root):
    (planned,) = plan(recipe(root, merge_method="linear", models=models("tied", "a")))
    job = {job.name: job for job in planned.plan.jobs}["lm_head.weight"]
    tied = Weights.open(root / "tied")
    assert job.experts[0].identity == tied.source("model.embed_tokens.weight").identity
    assert planned.plan.config["tie_word_embeddings"] is False


def test_shared_storage_stays_shared(root, tmp_path):
    import torch

    for seed, name in enumerate("xy"):
        arrays = tiny.tensors(2, 14, seed)
        state = {key: torch.from_numpy(value) for key, value in arrays.items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        torch.save(state, tmp_path / f"{name}.bin")
    (planned,) = plan(recipe(tmp_path, merge_method="linear", models=models("x.bin", "y.bin")))
    assert dict(planned.plan.aliases) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in planned.plan.specs

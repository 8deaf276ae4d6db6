"""Mixtures of experts, tensor by tensor beside what mergekit-moe writes of the same recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
import moe_models
from moe_models import told

from pluribus.core.weights import Weights
from pluribus.route import moe

SHARED = {"source_model": "{}-1", "residual_scale": 0.1}
PROMPTED = {**SHARED, "positive_prompts": ["yes no maybe"]}


def one(kind, mode, prompts=None, **changes):
    """Return a recipe with a single prompt an expert, so that no batch is padded."""
    made = told(kind, gate_mode=mode, **changes)
    for entry, prompt in zip(made["experts"], prompts or (["12 34 56"], ["alarm"]), strict=True):
        entry["positive_prompts"] = prompt
    made["experts"][1]["negative_prompts"] = ["Review: a dull film"]
    return made


def shared(kind, entry):
    return [{**entry, "source_model": entry["source_model"].format(kind)}]


MANY = (["12 34 56", "7"], ["alarm", "account blocked"])
CASES = {
    "mixtral-hidden": one("llama", "hidden"),
    "mixtral-last": one("llama", "hidden_last", MANY),
    "mixtral-avg": one("mistral", "hidden_avg"),
    "mixtral-cheap": one("llama", "cheap_embed", MANY),
    "mixtral-bf16": one("llama", "cheap_embed", dtype="bfloat16"),
    "qwen2-hidden": one("qwen2", "hidden", shared_experts=shared("qwen2", PROMPTED)),
    "qwen2-of-llama": one("llama", "hidden", shared_experts=shared("llama", PROMPTED)),
    "qwen3-hidden": one("qwen3", "hidden"),
    "qwen3-cheap": one("qwen3", "cheap_embed", MANY),
    "deepseek-hidden": one("llama", "hidden", shared_experts=shared("llama", SHARED)),
}
for number, entry in enumerate(CASES["qwen3-cheap"]["experts"]):
    entry["residual_scale"] = 0.5 + number


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    python = os.environ.get("MERGEKIT_PYTHON")
    if not python:
        pytest.skip("MERGEKIT_PYTHON is not set: no interpreter with mergekit 0.1.5")
    root = tmp_path_factory.mktemp("moe")
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        moe_models.family(root, kind)
    jobs = {name: yaml.safe_dump(recipe) for name, recipe in CASES.items()}
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("moe_oracle.py")
    env = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [python, str(script), str(root / "jobs.json")], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return root


def canonical(folder, experts=2):
    """Tensors by one set of names: experts apart, as the published checkpoints have them."""
    weights = Weights.open(folder)
    found = {}
    for name in weights.spec:
        value = weights[name]
        name = name.replace(".block_sparse_moe.", ".mlp.").replace(".router.layer.", ".gate.")
        name = name.replace(".shared_mlp.", ".mlp.shared_experts.")
        for ours, plain in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{ours}.weight", f".{plain}.weight")
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        if last in ("gate_up_proj", "input_linear"):
            for number, both in enumerate(value if value.ndim == 3 else value[None]):
                place = stem if "shared" in stem else f"{stem.removesuffix('.experts')}.experts"
                place = place if "shared" in stem else f"{place}.{number}"
                gate, up = both.chunk(2)
                found |= {f"{place}.gate_proj.weight": gate, f"{place}.up_proj.weight": up}
        elif last == "output_linear" or (last == "down_proj" and value.ndim == 3):
            for number, down in enumerate(value if value.ndim == 3 else value[None]):
                place = stem if "shared" in stem else f"{stem.removesuffix('.experts')}.experts"
                place = place if "shared" in stem else f"{place}.{number}"
                found[f"{place}.down_proj.weight"] = down
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_mergekits(oracle, name, tmp_path):
    error = oracle / "theirs" / f"{name}.error"
    assert not error.exists(), error.read_text()[-1500:]
    report = moe.assemble(moe.of(CASES[name], folder=oracle), tmp_path / "out")
    assert report.architecture.startswith(name.partition("-")[0])
    mine, theirs = canonical(tmp_path / "out"), canonical(oracle / "theirs" / name)
    assert set(mine) == set(theirs)
    gates = 0
    for tensor, value in theirs.items():
        assert mine[tensor].dtype == value.dtype, tensor
        if ".gate." in tensor or "shared_expert_gate" in tensor:
            gates += 1
            close = {"rtol": 0, "atol": 1e-5 if value.dtype == torch.float32 else 4e-3}
            torch.testing.assert_close(mine[tensor], value, msg=tensor, **close)
        else:
            assert torch.equal(mine[tensor], value), tensor
    assert gates == 2 * (1 + name.startswith("qwen2"))


@pytest.mark.parametrize(
    "name", [name for name in CASES if not name.startswith(("deepseek", "mixtral-avg"))]
)
def test_the_same_function_in_transformers(oracle, name, tmp_path):
    """Mistral apart, whose window mergekit drops, and DeepSeek, which is remote code there."""
    moe.assemble(moe.of(CASES[name], folder=oracle), tmp_path / "out")
    ids = torch.randint(0, 330, (2, 9), generator=torch.Generator().manual_seed(0))
    mine = moe_models.logits(moe_models.loaded(tmp_path / "out"), ids)
    theirs = moe_models.logits(moe_models.loaded(oracle / "theirs" / name), ids)
    close = {"rtol": 1e-4, "atol": 1e-4} if mine.dtype == torch.float32 else {}
    torch.testing.assert_close(mine, theirs, **close)

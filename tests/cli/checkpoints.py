"""Small Llama-like checkpoints and recipes for them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pluribus.core.dtypes import dtype, narrow
from pluribus.core.source import ArraySource, TensorSpec
from pluribus.core.weights import Weights

ROWS, HIDDEN, MLP, LAYERS = 17, 16, 24, 3
TIES = """\
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {density: 0.5, weight: 1.0}}
  - {model: code, parameters: {density: 0.5, weight: 0.5}}
"""
BANK = """\
method: tall_masks
parameters: {lambda: l1}
base_model: base
experts: {math: math, code: code}
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a model."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN)}
    for k in range(LAYERS):
        out[f"model.layers.{k}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        out[f"model.layers.{k}.mlp.up_proj.weight"] = (MLP, HIDDEN)
        out[f"model.layers.{k}.input_layernorm.weight"] = (HIDDEN,)
    return out | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (ROWS, HIDDEN)}


def tensors(seed: int, base: int | None = None) -> dict[str, np.ndarray]:
    """Random weights; with `base`, those of that seed and small updates."""
    rng = np.random.default_rng(seed)
    if base is not None:
        start = tensors(base)
        return {
            name: value + np.float32(0.1) * rng.standard_normal(value.shape, np.float32)
            for name, value in start.items()
        }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes().items()}


def save(path: Path, values: Mapping[str, np.ndarray], kind: str) -> None:
    """Write arrays as one safetensors file of an element type."""
    about = dtype(kind)
    sources = {
        name: ArraySource(narrow(value, about), TensorSpec(about.name, value.shape))
        for name, value in values.items()
    }
    Weights(sources).save(path)


def model(folder: Path, seed: int, base: int | None = None, kind: str = "bfloat16") -> Path:
    """Write a model folder with its configuration."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "vocab_size": ROWS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save(folder / "model.safetensors", tensors(seed, base), kind)
    return folder

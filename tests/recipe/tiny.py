"""Tiny Llama and Mistral folders made without transformers: config, safetensors, tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pluribus.core.dtypes import dtype, narrow
from pluribus.core.source import ArraySource, TensorSpec
from pluribus.core.weights import Weights

HIDDEN, MLP, HEADS = 16, 24, 2
NORMS = ("input_layernorm", "post_attention_layernorm")
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
WORDS = ["the", "a", "river", "runs", "low", "slow", "road", "polymer", "binds", "index", "return"]


def shapes(layers: int, rows: int, *, head: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for k in range(layers):
        for name, shape in LINEARS.items():
            out[f"model.layers.{k}.{name}.weight"] = shape
        for name in NORMS:
            out[f"model.layers.{k}.{name}.weight"] = (HIDDEN,)
    out["model.norm.weight"] = (HIDDEN,)
    if head:
        out["lm_head.weight"] = (rows, HIDDEN)
    return out


def tensors(
    layers: int, rows: int, seed: int, *, base: int | None = None, head: bool = True
) -> dict[str, np.ndarray]:
    """Return random weights; with `base`, those of that seed with updates of mixed sizes."""
    if base is not None:
        start = tensors(layers, rows, base, head=head)
        rng = np.random.default_rng(seed)
        return {
            name: (value + 0.02 * rng.standard_normal(value.shape) ** 3).astype(np.float32)
            for name, value in start.items()
        }
    rng = np.random.default_rng(seed)
    return {
        name: (0.1 * rng.standard_normal(shape) + (1 if len(shape) == 1 else 0)).astype(np.float32)
        for name, shape in shapes(layers, rows, head=head).items()
    }


def tokenizer(folder: Path, words: list[str], special: tuple[str, ...] = ()) -> int:
    """Write a word-level tokenizer and return how many tokens it has."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *words, *special])}
    added = [
        {
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in ("<s>", "</s>", "<unk>", *special)
    ]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return len(vocab)


def model(
    folder: Path,
    *,
    layers: int = 4,
    seed: int = 0,
    base: int | None = None,
    kind: str = "llama",
    words: list[str] | None = None,
    special: tuple[str, ...] = (),
    head: bool = True,
    element: str = "float32",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = tokenizer(folder, WORDS if words is None else words, special)
    values = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": not head,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": element,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(values))
    save(folder / "model.safetensors", tensors(layers, rows, seed, base=base, head=head), element)
    return folder


def save(path: Path, values: Mapping[str, np.ndarray], element: str = "float32") -> None:
    """Write arrays as one safetensors file of the element type."""
    kind = dtype(element)
    sources = {
        name: ArraySource(narrow(value, kind), TensorSpec(kind.name, value.shape))
        for name, value in values.items()
    }
    Weights(sources).save(path)


def arrays(weights: Weights) -> dict[str, np.ndarray]:
    """Return all tensors as float32 arrays."""
    return {
        name: weights.source(name).floats().reshape(weights.source(name).spec.shape)
        for name in weights
    }

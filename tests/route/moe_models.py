"""Dense decoders of a few thousand parameters with a tokenizer, and recipes of mixtures of them."""

import sys
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # tests have no package
import tiny_model  # type: ignore[import-not-found]

KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
KINDS |= {"granite": "Granite"}
PROMPTS = (["12 34 56", "7 8 90"], ["alarm account blocked"], ["Review: a fine film"])


def dense(kind="llama", seed=0, **changes):
    """Return a model; biases and norms are random too."""
    import transformers

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 330,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "initializer_range": 0.2,
        **changes,
    }
    config = getattr(transformers, f"{KINDS[kind]}Config")(**settings)
    model = getattr(transformers, f"{KINDS[kind]}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def expert(base, seed):
    """Return a copy of a model whose feed-forward blocks have changed."""
    import copy

    torch.manual_seed(seed)
    made = copy.deepcopy(base)
    for name, parameter in made.named_parameters():
        if ".mlp." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return made


tokenizer = cache(tiny_model.tokenizer)


def save(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def family(root, kind="llama", experts=2, **changes):
    """Write a base and experts of it as KIND-base, KIND-0, ...; return the models."""
    base = dense(kind, **changes)
    made = [expert(base, seed + 1) for seed in range(experts)]
    save(base, root / f"{kind}-base")
    for number, one in enumerate(made):
        save(one, root / f"{kind}-{number}")
    return base, made


def told(kind="llama", experts=2, **changes):
    """Return a recipe as plain values."""
    return {
        "base_model": f"{kind}-base",
        "gate_mode": "hidden",
        "experts": [
            {"source_model": f"{kind}-{number}", "positive_prompts": PROMPTS[number]}
            for number in range(experts)
        ],
        **changes,
    }


def loaded(folder):
    """Return the model that plain transformers reads, nothing missing and nothing too many."""
    from transformers import AutoModelForCausalLM

    model, about = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(about.values()), about
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits

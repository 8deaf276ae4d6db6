"""Small models for fusing: a large one, a small base, and tunings of it; and a tokenizer."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))  # tests have no package
import tiny_model  # type: ignore[import-not-found]

tokenizer = tiny_model.tokenizer


def tiny(seed, vocabulary=330, positions=512, layers=2, width=32, **changes):
    """A Llama of a few thousand parameters whose predictions depend on what was read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.3,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def moved(model, seed, by=0.05):
    """A tuning of a model: the same weights, moved a little."""
    made = type(model)(model.config).eval()
    rng = torch.Generator().manual_seed(seed)
    state = {
        name: t + by * torch.randn(t.shape, generator=rng) for name, t in model.state_dict().items()
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    made.load_state_dict(state)
    return made


def trio(**changes):
    """Roles of logits fusion: a larger model, a small base, and an expert tuned from it."""
    base = tiny(1, **changes)
    return {"large": tiny(0, layers=3, **changes), "base": base, "expert": moved(base, 2)}


def ids(rows=3, length=9, seed=0, vocabulary=330):
    return torch.randint(
        5, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed)
    )

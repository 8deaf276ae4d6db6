"""Whole checkpoints of many architectures of transformers, routed, beside each row's own merge."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pluribus.route import from_checkpoints

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
WORDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BOTH_SIDES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 1), ("ffn_dim", 32), ("attention_heads", 2))
}
IMAGES = {"image_size": 32, "patch_size": 4}


def made(model: str, config: str, **settings: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def ids(rows: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (rows, 7))}


def pictures(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 32, 32)}


def pairs(rows: int) -> dict[str, torch.Tensor]:
    return {**ids(rows), "decoder_input_ids": torch.randint(3, 50, (rows, 4))}


def sounds(rows: int) -> dict[str, torch.Tensor]:
    spoken = torch.randn(rows, 8, 40)
    return {"input_features": spoken, "decoder_input_ids": torch.randint(3, 50, (rows, 4))}


SWIN = {**IMAGES, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
LLAMA = {**SMALL, **WORDS, "num_key_value_heads": 1, "head_dim": 8}
CASES = {  # the model, its inputs, and whether all of it runs in one batch
    "vit": (partial(made, "ViTModel", "ViTConfig", **IMAGES, **SMALL), pictures, True),
    "clip": (
        partial(made, "CLIPVisionModel", "CLIPVisionConfig", **IMAGES, **SMALL),
        pictures,
        True,
    ),
    "swin": (partial(made, "SwinModel", "SwinConfig", **SWIN), pictures, False),
    "swinv2": (partial(made, "Swinv2Model", "Swinv2Config", **SWIN), pictures, False),
    "convnext": (
        partial(
            made, "ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]
        ),
        pictures,
        False,
    ),
    "resnet": (
        partial(
            made,
            "ResNetModel",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 8],
            depths=[1, 1],
            layer_type="basic",
        ),
        pictures,
        True,
    ),
    "bert": (partial(made, "BertModel", "BertConfig", **WORDS, **SMALL), ids, True),
    "roberta": (partial(made, "RobertaModel", "RobertaConfig", **WORDS, **SMALL), ids, True),
    "deberta": (
        partial(
            made,
            "DebertaV2Model",
            "DebertaV2Config",
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            **WORDS,
            **SMALL,
        ),
        ids,
        False,
    ),
    "gpt2": (
        partial(
            made,
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            **WORDS,
        ),
        ids,
        True,
    ),
    "opt": (
        partial(
            made,
            "OPTModel",
            "OPTConfig",
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=40,
            word_embed_proj_dim=16,
            **WORDS,
        ),
        ids,
        True,
    ),
    "bart": (
        partial(
            made,
            "BartModel",
            "BartConfig",
            d_model=16,
            max_position_embeddings=40,
            **BOTH_SIDES,
            **WORDS,
        ),
        pairs,
        False,
    ),
    "whisper": (
        partial(
            made,
            "WhisperModel",
            "WhisperConfig",
            d_model=16,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
            decoder_start_token_id=1,
            **BOTH_SIDES,
            **WORDS,
        ),
        sounds,
        True,
    ),
    "t5": (
        partial(
            made,
            "T5Model",
            "T5Config",
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            **WORDS,
        ),
        pairs,
        False,
    ),
    "qwen3": (
        partial(made, "Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True, **LLAMA),
        ids,
        True,
    ),
    "gemma2": (partial(made, "Gemma2ForCausalLM", "Gemma2Config", **LLAMA), ids, True),
    "gptneox": (partial(made, "GPTNeoXModel", "GPTNeoXConfig", **WORDS, **SMALL), ids, True),
    "mamba": (
        partial(
            made,
            "MambaModel",
            "MambaConfig",
            hidden_size=16,
            num_hidden_layers=1,
            state_size=4,
            **WORDS,
        ),
        ids,
        False,
    ),
    "mixtral": (
        partial(
            made,
            "MixtralForCausalLM",
            "MixtralConfig",
            num_local_experts=2,
            num_experts_per_tok=1,
            **LLAMA,
        ),
        ids,
        False,
    ),
}


def moved(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return an expert's tensors; those that are one in the network stay one."""
    noise: dict[int, torch.Tensor] = {}
    for tensor in net.state_dict().values():
        noise.setdefault(tensor.data_ptr(), 0.05 * torch.randn(tensor.shape))
    out = {}
    for name, tensor in net.state_dict().items():
        delta = noise[tensor.data_ptr()]
        delta = delta.abs() if "running_var" in name else delta
        out[name] = tensor + delta if tensor.is_floating_point() else tensor
    return out


@pytest.mark.parametrize("rows", [4, 5, 7])
@pytest.mark.parametrize("kind", CASES)
def test_each_row_is_its_own_merge(kind, rows):
    """As many rows as places (7), rows of which places are a multiple (4), and neither."""
    build, draw, together = CASES[kind]
    torch.manual_seed(0)
    net = build()
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    experts = {label: moved(net) for label in ("a", "b", "c")}
    routed = from_checkpoints(net, base, experts, rank=4)
    inputs, names = draw(rows), ["b", "a", "c", "a", "b", "b", "c"][:rows]
    with torch.no_grad():
        expected = [
            functional_call(
                net,
                routed.materialise(name),
                (),
                {key: value[row : row + 1] for key, value in inputs.items()},
                tie_weights=False,
            )[0]
            for row, name in enumerate(names)
        ]
        for _ in range(2):
            found = routed(**inputs, weights=names)[0]
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=2e-5)
        plain = net(**inputs)[0]
    assert float((found - plain).abs().max()) > 0.01 * float(plain.abs().max())
    assert bool(routed.report()["run_apart"]) != together

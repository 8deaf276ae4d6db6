"""Qwen2-MoE: experts, and exactly one shared expert with a gate of its own.

    y = sum over the top k of w_i E_i(x) + sigmoid(g x) S(x),    w as Mixtral's

Yang et al., Qwen2 technical report, 2024, https://arxiv.org/abs/2407.10671, section 2.2.2. A base
without biases in attention (Llama, Mistral) gets zeros, as from mergekit-moe.
"""

from collections.abc import Mapping
from typing import Any

from pluribus.core.source import Source
from pluribus.route.moe.layouts._layout import Layer, Sizes, biases, each, layout, window

NAMES = ("gate_proj", "up_proj", "down_proj")


@layout(
    "qwen2_moe",
    bases=("qwen2", "llama", "mistral"),
    family="Qwen2Moe",
    titles=("Qwen MoE",),
    rank=2,
)
class Qwen2Moe:
    """See the module."""

    gated_shared = True
    gate = "model.layers.{layer}.mlp.gate.weight"
    router = "mlp.gate"

    def refusal(self, base: Mapping[str, Any], sizes: Sizes) -> str | None:
        """See `Layout`."""
        if sizes.shared != 1:
            return f"has exactly one shared expert, and shared_experts lists {sizes.shared}"
        if base["model_type"] == "llama" and base.get("attention_bias"):
            return "has no bias in attention's output, and the base has"
        return None

    def config(self, base: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """See `Layout`."""
        wide = base["intermediate_size"]
        windowed = window(base)
        all_alike = ["sliding_attention" if windowed else "full_attention"]
        return {
            "use_sliding_window": windowed,
            "sliding_window": base["sliding_window"] if windowed else None,
            "layer_types": base.get("layer_types") or all_alike * base["num_hidden_layers"],
            "num_experts": sizes.experts,
            "num_experts_per_tok": sizes.per_token,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "qkv_bias": True,
            "moe_intermediate_size": wide,
            "shared_expert_intermediate_size": wide,
        }

    def notes(self, base: Mapping[str, Any]) -> list[str]:
        """See `Layout`."""
        return []

    def tensors(self, layer: int, made: Layer) -> dict[str, Source]:
        """See `Layout`."""
        prefix = f"model.layers.{layer}.mlp"
        assert made.shared_gate is not None
        found = each(f"{prefix}.experts", made.experts, NAMES)
        shared = zip(NAMES, made.shared[0], strict=True)
        found |= {f"{prefix}.shared_expert.{name}.weight": tensor for name, tensor in shared}
        found[self.gate.format(layer=layer)] = made.gate
        found[f"{prefix}.shared_expert_gate.weight"] = made.shared_gate
        return found

    def added(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """See `Layout`."""
        return biases(shapes, ("q_proj", "k_proj", "v_proj"))

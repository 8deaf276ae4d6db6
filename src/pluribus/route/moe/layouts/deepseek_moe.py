"""DeepSeek-MoE: experts, and shared experts that every token passes without a gate.

    y = sum over the top k of w_i E_i(x) + sum_j S_j(x),    w as Mixtral's

Dai et al., 2024, https://arxiv.org/abs/2401.06066, section 3.3, with weights renormalised over the
top k. transformers has no model of the first DeepSeek-MoE (those of V2 and V3 compress their
attention, which a dense base's does not fit; mergekit-moe writes one that needs remote code), but
GraniteMoeShared computes exactly this on Llama's attention, so that is what is written. Several
shared experts are one that is as wide as all. Biases in attention have a place, and a Qwen2 base,
which has three of the four, gets zeros for the fourth.
"""

from collections.abc import Mapping
from typing import Any

from pluribus.core.source import Source
from pluribus.route.moe.layouts._layout import Layer, Sizes, biases, fused, layout, window
from pluribus.route.moe.sources import Beside, Joined

MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


@layout(
    "deepseek_moe",
    bases=("llama", "mistral", "qwen2", "granite"),
    family="GraniteMoeShared",
    titles=("DeepSeek MoE", "granitemoeshared"),
    rank=1,
)
class DeepseekMoe:
    """See the module."""

    gated_shared = False
    gate = "model.layers.{layer}.block_sparse_moe.router.layer.weight"
    router = "block_sparse_moe.router"

    def refusal(self, base: Mapping[str, Any], sizes: Sizes) -> str | None:
        """See `Layout`."""
        return None

    def config(self, base: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """See `Layout`."""
        head = base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"]
        own = base if base["model_type"] == "granite" else {}
        biased = base["model_type"] == "qwen2" or bool(base.get("attention_bias"))
        return {
            **{name: own.get(name, 1.0) for name in MULTIPLIERS},
            "attention_multiplier": own.get("attention_multiplier", head**-0.5),
            "attention_bias": biased,
            "num_local_experts": sizes.experts,
            "num_experts_per_tok": sizes.per_token,
            "shared_intermediate_size": sizes.shared * base["intermediate_size"],
        }

    def notes(self, base: Mapping[str, Any]) -> list[str]:
        """See `Layout`."""
        if not window(base):
            return []
        return [
            "the base attends to a window, for which this architecture has no place; inputs of "
            f"more than {base['sliding_window']} tokens are attended to as a whole"
        ]

    def tensors(self, layer: int, made: Layer) -> dict[str, Source]:
        """See `Layout`."""
        prefix = f"model.layers.{layer}"
        inputs, outputs = fused(made.experts)
        found: dict[str, Source] = {
            f"{prefix}.block_sparse_moe.input_linear.weight": inputs,
            f"{prefix}.block_sparse_moe.output_linear.weight": outputs,
            self.gate.format(layer=layer): made.gate,
        }
        if made.shared:
            wide = sum(mlp.width for mlp in made.shared)
            d = made.shared[0].gate.spec.shape[1]
            rows = [mlp.gate for mlp in made.shared] + [mlp.up for mlp in made.shared]
            found[f"{prefix}.shared_mlp.input_linear.weight"] = Joined(rows, (2 * wide, d))
            down = Beside([mlp.down for mlp in made.shared])
            found[f"{prefix}.shared_mlp.output_linear.weight"] = down
        return found

    def added(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """See `Layout`."""
        if not any(name.endswith("self_attn.q_proj.bias") for name in shapes):
            return {}
        return biases(shapes, ("q_proj", "k_proj", "v_proj", "o_proj"))

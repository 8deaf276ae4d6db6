"""Qwen3-MoE: Qwen3's attention with normalised queries and keys; experts without a shared one.

    y = sum over the top k of w_i E_i(x),    w as Mixtral's

Yang et al., Qwen3 technical report, 2025, https://arxiv.org/abs/2505.09388, section 2.
"""

from collections.abc import Mapping
from typing import Any

from pluribus.core.source import Source
from pluribus.route.moe.layouts._layout import Layer, Sizes, each, layout, window


@layout("qwen3_moe", bases=("qwen3",), family="Qwen3Moe", titles=("Qwen3 MoE",), rank=1)
class Qwen3Moe:
    """See the module."""

    gated_shared = False
    gate = "model.layers.{layer}.mlp.gate.weight"
    router = "mlp.gate"

    def refusal(self, base: Mapping[str, Any], sizes: Sizes) -> str | None:
        """See `Layout`."""
        return "has no shared experts" if sizes.shared else None

    def config(self, base: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """See `Layout`."""
        windowed = window(base) and _everywhere(base)
        return {
            "num_experts": sizes.experts,
            "num_experts_per_tok": sizes.per_token,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "moe_intermediate_size": base["intermediate_size"],
            "use_sliding_window": windowed,
            "sliding_window": base.get("sliding_window") if windowed else None,
        }

    def notes(self, base: Mapping[str, Any]) -> list[str]:
        """See `Layout`."""
        if not window(base) or _everywhere(base):
            return []
        return [
            "only some of the base's layers attend to a window, which Qwen3-MoE cannot say; all "
            f"will attend to everything, which differs beyond {base['sliding_window']} tokens"
        ]

    def tensors(self, layer: int, made: Layer) -> dict[str, Source]:
        """See `Layout`."""
        prefix = f"model.layers.{layer}.mlp.experts"
        found = each(prefix, made.experts, ("gate_proj", "up_proj", "down_proj"))
        return found | {self.gate.format(layer=layer): made.gate}

    def added(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """See `Layout`."""
        return {}


def _everywhere(base: Mapping[str, Any]) -> bool:
    return len(set(base.get("layer_types") or ())) < 2

"""Mixtral: Llama's and Mistral's attention; experts without a shared one.

    y = sum over the top k of w_i E_i(x),    w = softmax(G x) renormalised over the top k

Jiang et al., 2024, https://arxiv.org/abs/2401.04088, section 2.1. A Mistral's attention window is
kept; mergekit-moe drops it.
"""

from collections.abc import Mapping
from typing import Any

from pluribus.core.source import Source
from pluribus.route.moe.layouts._layout import Layer, Sizes, each, layout


@layout("mixtral", bases=("llama", "mistral"), family="Mixtral")
class Mixtral:
    """See the module."""

    gated_shared = False
    gate = "model.layers.{layer}.block_sparse_moe.gate.weight"
    router = "mlp.gate"

    def refusal(self, base: Mapping[str, Any], sizes: Sizes) -> str | None:
        """See `Layout`."""
        if sizes.shared:
            return "has no shared experts"
        if base.get("attention_bias"):
            return "has no attention biases, and the base has"
        return None

    def config(self, base: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """See `Layout`."""
        own = base["model_type"] == "mistral"
        return {
            "num_local_experts": sizes.experts,
            "num_experts_per_tok": sizes.per_token,
            "sliding_window": base.get("sliding_window") if own else None,
            "router_jitter_noise": 0.0,
        }

    def notes(self, base: Mapping[str, Any]) -> list[str]:
        """See `Layout`."""
        return []

    def tensors(self, layer: int, made: Layer) -> dict[str, Source]:
        """See `Layout`."""
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        found = each(prefix, made.experts, ("w1", "w3", "w2"))
        return found | {self.gate.format(layer=layer): made.gate}

    def added(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """See `Layout`."""
        return {}

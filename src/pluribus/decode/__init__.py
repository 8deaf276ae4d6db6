"""Several causal language models as one while they write: logits are combined token by token.

    fused = Fused({"large": large, "base": base, "maths": expert}, DynamicFusion())
    fused.generate(**tokenizer("2 + 2 =", return_tensors="pt"), max_new_tokens=20)

A `Fused` is a transformers model: pipelines, evaluation and servers take it as they take any. Names
are imported when they are first used, for transformers is large.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluribus.decode._config import FusedConfig
    from pluribus.decode._members import Unadapted
    from pluribus.decode.emulate import dial, implicit_reward, upscale
    from pluribus.decode.fused import Fused
    from pluribus.decode.fusers import FUSERS, Fuser, Fusion
    from pluribus.decode.fusers.contrastive import Contrastive
    from pluribus.decode.fusers.eft import EFT
    from pluribus.decode.fusers.logits_fusion import DynamicFusion
    from pluribus.decode.fusers.mixture import Mixture
    from pluribus.decode.fusers.product import Product
    from pluribus.decode.fusers.static import StaticFusion
    from pluribus.decode.plot import plot_weights
    from pluribus.decode.speculative import SpeculativeDecoder

_WHERE = {
    "Contrastive": "fusers.contrastive",
    "DynamicFusion": "fusers.logits_fusion",
    "EFT": "fusers.eft",
    "FUSERS": "fusers",
    "Fused": "fused",
    "FusedConfig": "_config",
    "Fuser": "fusers",
    "Fusion": "fusers",
    "Mixture": "fusers.mixture",
    "Product": "fusers.product",
    "SpeculativeDecoder": "speculative",
    "StaticFusion": "fusers.static",
    "Unadapted": "_members",
    "dial": "emulate",
    "implicit_reward": "emulate",
    "plot_weights": "plot",
    "upscale": "emulate",
}

__all__ = [
    "EFT",
    "FUSERS",
    "Contrastive",
    "DynamicFusion",
    "Fused",
    "FusedConfig",
    "Fuser",
    "Fusion",
    "Mixture",
    "Product",
    "SpeculativeDecoder",
    "StaticFusion",
    "Unadapted",
    "dial",
    "implicit_reward",
    "plot_weights",
    "upscale",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'pluribus.decode' has no attribute {name!r}")
    return getattr(import_module(f"pluribus.decode.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

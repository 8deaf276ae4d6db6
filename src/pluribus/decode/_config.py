"""What transformers asks of a `Fused`: its configuration, and the form of its outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pluribus.core.optional import optional

hf = optional("transformers", "hf", "fusing language models")
outputs = optional("transformers.modeling_outputs", "hf", "fusing language models")


class FusedConfig(hf.PretrainedConfig):
    """Sizes that all members share, and how they are fused."""

    model_type = "pluribus_fused"

    def __init__(
        self,
        vocab_size: int = 0,
        max_position_embeddings: int | None = None,
        roles: Sequence[str] = (),
        fuser: Mapping[str, Any] | None = None,
        align: str = "same",
        **settings: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.roles = list(roles)
        self.fuser = dict(fuser or {})
        self.align = align
        super().__init__(**settings)


@dataclass
class FusedOutput(outputs.CausalLMOutputWithPast):
    """What a causal language model gives, and the weight of each role at each kept position."""

    weights: dict[str, Tensor] | None = None  # (b, s)

"""Attention that somebody else computes: whoever `attending` names gets queries, keys and values.

No module is touched: transformers takes attention functions by name. What a model hands over is
split into heads and turned by its positions already, whatever the model calls its projections; what
comes back goes to its output projection. So a head's output can be seen and set before W_O.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pluribus.core.errors import InputError
from pluribus.core.optional import optional
from pluribus.core.shapes import Float

hf = optional("transformers", "hf", "looking into attention heads")

NAME = "pluribus_heads"
CARRIED = ("softcap", "s_aux", "sliding_window", "position_bias")  # what we would have to add


@runtime_checkable
class Attend(Protocol):
    """Computes one module's attention."""

    def __call__(
        self,
        module: nn.Module,
        queries: Float[Tensor, "b h s e"],
        keys: Float[Tensor, "b g s e"],
        values: Float[Tensor, "b g s f"],
        scaling: float,
        /,
    ) -> Float[Tensor, "b s h f"]:
        """Return each head's output at each position."""
        ...


_current: ContextVar[Attend] = ContextVar("attend")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    del attention_mask  # rows are padded behind their end, which no earlier token sees
    for name in CARRIED:
        if options.get(name) is not None:
            raise InputError(
                f"the attention of {type(module).__name__} has {name}, which is not carried over; "
                "heads can be patched in models with plain causal attention"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _current.get()(module, query, key, value, scale), None


hf.AttentionInterface.register(NAME, _attention)


@contextmanager
def attending(model: Any, attend: Attend) -> Iterator[None]:
    """Let a function compute a model's attention; afterwards the model attends as it did."""
    before = model.config._attn_implementation
    token = _current.set(attend)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        _current.reset(token)


def pattern_of(
    queries: Float[Tensor, "b h s e"], keys: Float[Tensor, "b g s e"], scaling: float
) -> Float[Tensor, "b h s s"]:
    """Return causal attention, in float32."""
    heads, length = queries.shape[1:3]
    wide = keys.repeat_interleave(heads // keys.shape[1], 1)
    scores = (queries @ wide.transpose(2, 3)).float() * scaling
    causal = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def mixed(
    pattern: Float[Tensor, "b h s s"], values: Float[Tensor, "b g s f"]
) -> Float[Tensor, "b s h f"]:
    """Return heads' outputs: values weighed by a pattern."""
    wide = values.repeat_interleave(pattern.shape[1] // values.shape[1], 1)
    return (pattern.to(values.dtype) @ wide).transpose(1, 2)

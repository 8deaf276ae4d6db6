"""Chat back-ends: whatever writes, behind one small interface.

    model.sample(prompt or messages, n, temperature=..., max_tokens=..., stop=..., prefix=...)
        -> [Completion]

A prompt is a text (one turn of the user) or messages `{"role": ..., "content": ...}`. `ChatModel`
is what `pluribus.decode.scaling` calls a `Generator`. Names are imported when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluribus.agents.cached import Cached
    from pluribus.agents.endpoint import OpenAICompatible
    from pluribus.agents.local import LocalModel
    from pluribus.agents.metered import Metered
    from pluribus.agents.replay import Replay
    from pluribus.agents.scripted import Scripted
    from pluribus.decode.scaling.interface import Completion
    from pluribus.decode.scaling.interface import Generator as ChatModel

_WHERE = {
    "Cached": "pluribus.agents.cached",
    "ChatModel": "pluribus.decode.scaling.interface",
    "Completion": "pluribus.decode.scaling.interface",
    "LocalModel": "pluribus.agents.local",
    "Metered": "pluribus.agents.metered",
    "OpenAICompatible": "pluribus.agents.endpoint",
    "Replay": "pluribus.agents.replay",
    "Scripted": "pluribus.agents.scripted",
}

__all__ = [
    "Cached",
    "ChatModel",
    "Completion",
    "LocalModel",
    "Metered",
    "OpenAICompatible",
    "Replay",
    "Scripted",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module 'pluribus.agents' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), "Generator" if name == "ChatModel" else name)


def __dir__() -> list[str]:
    return sorted(__all__)

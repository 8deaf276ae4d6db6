"""What transformers calls things in some releases, and otherwise in others."""

import inspect
from collections.abc import Callable, Collection
from typing import Any


def cache_name(forward: Callable[..., Any] | Collection[str]) -> str:
    """Return what a model's `forward` calls the key-value cache; its parameters' names do too."""
    names = inspect.signature(forward).parameters if callable(forward) else forward
    return "cache" if "cache" in names else "past_key_values"

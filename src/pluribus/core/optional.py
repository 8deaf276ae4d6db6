"""Packages that only some features need, imported where they are used.

By name, so that a type checker does not read the whole of a large package to check one call.
"""

import importlib
import warnings
from typing import Any

from pluribus.core.errors import need


def optional(package: str, extra: str, purpose: str) -> Any:
    """Import a package, without its own warnings. Raises ExtraError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError:
        raise need(package, extra, purpose) from None

"""The one place that imports pyglove, and says what to install where it is missing."""

from typing import Any

from pluribus.core.errors import need

try:
    import pyglove
except ImportError:
    raise need("pyglove", "search", "pluribus.search") from None

pg: Any = pyglove  # its classes are made at run time, so a type checker knows little of them

__all__ = ["pg"]

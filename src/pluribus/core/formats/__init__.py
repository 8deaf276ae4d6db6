"""Checkpoint formats. A format is one file here: it says which paths are its own and opens them.

Every module defines `claims(path: Path) -> bool` (by name and, where cheap, first bytes) and
`read(path: Path) -> Opened`.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pluribus.core.errors import FormatError
from pluribus.core.source import Source


class Opened(NamedTuple):
    """What a format found in a file: tensors in file order, text metadata, shared names."""

    sources: dict[str, Source]
    metadata: Mapping[str, str]
    aliases: Mapping[str, str] = {}  # another name of a tensor -> the name it is kept under


def read(path: Path) -> Opened:
    """Open one checkpoint file with the format that claims it.

    Raises FormatError if none does.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    for module in modules:
        if module.claims(path):
            return module.read(path)
    raise FormatError(
        f"{path}: not a checkpoint that can be read here; formats: {', '.join(names)} "
        "(.safetensors, .bin/.pt/.pth, .gguf)"
    )

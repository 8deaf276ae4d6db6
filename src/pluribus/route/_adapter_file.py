"""Files of adapters, of inventories, of what a transfer learned: safetensors with a table."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pluribus.core.errors import FormatError, MismatchError, MissingError
from pluribus.route.store import digest


def read(
    path: Path, form: str, keys: tuple[str, ...], what: str = "a file"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one of our files: its table and tensors. Raises MissingError or FormatError."""
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get("pluribus", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise MissingError(f"{path}: no such {what.partition(' ')[2]}") from None
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error})") from None
    try:
        table = json.loads(told)
        if table["format"] != form:
            raise ValueError(f"it says {table['format']!r}")
        for key in keys:
            table[key]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not {what} of {form!r} ({error!r})") from None
    return table, tensors


def check_base(path: Path, told: str, model: nn.Module) -> None:
    """Raise MismatchError if a file was made for a model with other tensors."""
    if digest(model) != told:
        raise MismatchError(
            f"{path}: this {type(model).__name__} has other tensors than the model it was made "
            "for; give that one, or train anew"
        )

"""A compression recipe: which compressor, which base, which experts under which task names.

method: tall_masks
parameters: {multi: task_arithmetic, lambda: l1}
base_model: base/
experts: {math: math/, code: code/}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pluribus.compress import compressor
from pluribus.core.errors import MissingError, RecipeError, nearest
from pluribus.core.refs import ModelRef
from pluribus.core.weights import Weights


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    base_model: Any
    experts: dict[str, Any]


@dataclass(frozen=True)
class Compression:
    """A recipe with its models opened."""

    what: Any
    base: Weights
    experts: Mapping[str, Weights]


def load(path: Path) -> Compression:
    """Read a compression recipe; paths are relative to its folder.

    Raises MissingError, or RecipeError naming the key that is wrong.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise MissingError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    try:
        table = yaml.safe_load(text)
        asked = _Schema.model_validate(table)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"])) or "the recipe"
        raise RecipeError(
            f"{path}: {key}: {fault['msg']}; a compression recipe has "
            f"{', '.join(_Schema.model_fields)}." + nearest(key, _Schema.model_fields)
        ) from None
    parameters = {"method": asked.method, "parameters": asked.parameters}
    what = compressor(parameters)
    experts = {task: _open(ref, path.parent, task) for task, ref in asked.experts.items()}
    return Compression(what, _open(asked.base_model, path.parent, None), experts)


def _open(ref: Any, folder: Path, label: str | None) -> Weights:
    if isinstance(ref, str) and (folder / ref).exists():
        ref = str(folder / ref)
    return Weights.open(ModelRef.model_validate(ref), label=label)

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

from pluribus.compress import compressor
from pluribus.core.errors import InputError, MissingError, RecipeError, nearest
from pluribus.core.refs import ModelRef
from pluribus.core.weights import Weights, beside
from pluribus.recipe.text import Document, documents

KEYS = ("method", "parameters", "base_model", "experts")


@dataclass(frozen=True)
class Compression:
    """A recipe with its models opened."""

    what: Any
    base: Weights
    experts: Mapping[str, Weights]


def load(path: Path) -> Compression:
    """Read a compression recipe; paths are looked for in its folder first.

    Raises MissingError, or RecipeError naming file, line and key.
    """
    document = _document(path)
    table = document.value

    def wrong(key: str, why: str) -> RecipeError:
        line = document.line((key,))
        return RecipeError(f"{path}:{line}: {why}" if line else f"{path}: {why}")

    if not isinstance(table, Mapping):
        raise RecipeError(f"{path}: a recipe is keys with values: {', '.join(KEYS)}")
    for key in table:
        if key not in KEYS:
            near = nearest(str(key), KEYS)
            raise wrong(key, f"unknown key {key!r}; there are: {', '.join(KEYS)}.{near}")
    for key in KEYS:
        if key != "parameters" and table.get(key) is None:
            raise RecipeError(f"{path}: {key} is missing; a recipe has {', '.join(KEYS)}")
    experts, parameters = table["experts"], table.get("parameters") or {}
    if not isinstance(experts, Mapping) or not experts:
        raise wrong("experts", "experts are task names with their models: {math: math/}")
    if not isinstance(parameters, Mapping):
        raise wrong("parameters", "parameters are names with their values: {lambda: l1}")
    if not isinstance(table["method"], str):
        raise wrong("method", f"method is a name, not {table['method']!r}")
    try:
        what = compressor({"method": table["method"], "parameters": parameters})
    except (InputError, RecipeError) as error:
        key = "method" if "compressor" in str(error) else "parameters"
        raise wrong(key, str(error)) from None
    opened = {str(task): _open(ref, path.parent, str(task)) for task, ref in experts.items()}
    return Compression(what, _open(table["base_model"], path.parent, None), opened)


def _document(path: Path) -> Document:
    try:
        text = path.expanduser().read_text("utf-8")
    except FileNotFoundError:
        raise MissingError(f"{path}: no such recipe.{beside(path)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; a recipe is a YAML file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    found = documents(text, str(path))
    if len(found) != 1:
        raise RecipeError(f"{path}: holds {len(found)} YAML documents; a compression recipe is one")
    return found[0]


def _open(ref: Any, folder: Path, label: str | None) -> Weights:
    if isinstance(ref, str) and (folder / ref).exists():
        ref = str(folder / ref)
    return Weights.open(ModelRef.of(ref), label=label)

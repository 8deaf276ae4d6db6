"""Files that hold one YAML document: tuning recipes, recipes of composites."""

from pathlib import Path

import yaml
from pydantic import PrivateAttr, ValidationError

from pluribus.core.errors import MissingError, RecipeError, nearest
from pluribus.recipe.schema import Strict
from pluribus.recipe.text import Document, documents


class WithData(Strict):
    """One model and a file of texts like those it is for."""

    model: str
    data: str | None = None
    name: str | None = None  # by default its folder's


class Placed(Strict):
    """A recipe whose paths are looked for beside its file first."""

    _folder: Path | None = PrivateAttr(None)

    def place(self, path: str) -> str:
        """Return a path beside the recipe if there is such a one, else as it is written."""
        beside = self._folder / path if self._folder is not None else None
        return str(beside) if beside is not None and beside.exists() else path


def single(path: str | Path, what: str) -> Document:
    """Read the one document of a file; `what` names its kind in messages.

    Raises MissingError with the nearest name, or RecipeError for what is no such file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; a recipe is a YAML file")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(path.name, [entry.name for entry in beside])
        raise MissingError(f"{path}: no such recipe.{near}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text file in UTF-8") from None
    try:
        found = documents(text, str(path))
    except yaml.YAMLError as error:  # characters that no YAML holds
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not found:
        raise RecipeError(f"{path}: there is no recipe in it")
    if len(found) > 1:
        raise RecipeError(f"{path}: holds {len(found)} documents; {what} is one")
    return found[0]


def fault(error: ValidationError, where: str, document: Document | None = None) -> str:
    """Return the first fault with its line, its place and what was given."""
    first = error.errors()[0]
    loc, kind, given = first["loc"], first["type"], first.get("input")
    line = document.line(loc) if document is not None and loc else None
    spot = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    said = first["msg"].removeprefix("Value error, ")
    if kind == "missing":
        said = "is missing"
    elif kind == "too_short":
        said = "at least one is needed"
    elif kind not in ("unknown_key", "value_error"):
        said = f"{said}, not {given!r}"
    at = where if line is None else f"{where}:{line}"
    return f"{at}: {spot.lstrip('.') + ': ' if spot else ''}{said}"

"""The model that lends a merge its tokenizer without taking part in it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pluribus.core.errors import MissingError, RecipeError, nearest
from pluribus.core.refs import ModelRef
from pluribus.core.weights import Weights
from pluribus.recipe.schema import Recipe
from pluribus.tokenizer import load_vocab
from pluribus.tokenizer.align import VocabIn

Opener = Callable[[ModelRef], Weights]


def donor_text(recipe: Recipe) -> Any:
    """Return what a recipe's tokenizer_source says, as text."""
    source = recipe.tokenizer_source
    return source if source is None or isinstance(source, str) else str(source)


def donor_of(
    source: Any, labels: Sequence[str], open_model: Opener
) -> tuple[Path | None, VocabIn | None]:
    """Return folder and vocabulary of a tokenizer source that takes no part in the merge.

    Raises MissingError or RecipeError for one without a tokenizer.
    """
    if isinstance(source, str) or str(source) in labels:
        return None, None
    try:
        folder = open_model(source).folder
    except MissingError as error:
        near = nearest(str(source), ("union", "base"))
        raise MissingError(f"tokenizer source {source}: {error}{near}") from None
    if folder is None:
        raise RecipeError(f"tokenizer source {source} is a bare file without a tokenizer")
    return folder, load_vocab(folder, label=str(source))

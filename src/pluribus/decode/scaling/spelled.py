"""Strategies as text: `self_consistency, beam_search(n=8, width=2)`."""

import ast
from dataclasses import fields, replace
from typing import Any

from pluribus.core.errors import RecipeError
from pluribus.decode.scaling.interface import Sampling
from pluribus.decode.scaling.strategies import STRATEGIES, build


def strategies(text: str, *, n: int | None = None, sampling: Sampling) -> dict[str, Any]:
    """Return the strategies that a text names, by what it calls them.

    `n` is theirs where they have one and the text gives none; the sampling is given to all. Raises
    RecipeError for what is no such list, InputError for a bad parameter.
    """
    found: dict[str, Any] = {}
    for label, kind, given in _parsed(text):
        own = {one.name for one in fields(STRATEGIES[kind])}  # type: ignore[arg-type]
        if n is not None and "n" in own and "n" not in given:
            given["n"] = n
        strategy = build({"kind": kind, **given})
        found[label] = replace(strategy, sampling=sampling)
    return found


def _parsed(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return label, kind and parameters of each."""
    how = "write names, or calls such as beam_search(n=8, width=2), with commas between them"
    try:
        tree = ast.parse(f"[{text.strip()}]", mode="eval").body
    except (SyntaxError, ValueError):
        raise RecipeError(f"{text!r} is no list of strategies; {how}") from None
    told = []
    for node in tree.elts if isinstance(tree, ast.List) else []:
        if isinstance(node, ast.Name):
            told.append((node.id, node.id, {}))
            continue
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise RecipeError(f"{ast.unparse(node)!r} is no strategy; {how}")
        if node.args or any(word.arg is None for word in node.keywords):
            raise RecipeError(f"{ast.unparse(node)!r} is no strategy; name its parameters: {how}")
        try:
            values = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        except ValueError:
            raise RecipeError(
                f"{ast.unparse(node)!r}: parameters are numbers, texts in quotes, True, False or "
                "None"
            ) from None
        told.append((ast.unparse(node), node.func.id, values))
    if not told:
        raise RecipeError(f"no strategy is named; there are {', '.join(STRATEGIES)}")
    if len({label for label, _, _ in told}) < len(told):
        raise RecipeError(f"{text!r} names a strategy twice")
    return told

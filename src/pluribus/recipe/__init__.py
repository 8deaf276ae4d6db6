"""Recipes: merges written in YAML, mergekit's files among them, laid out and run."""

from pluribus.recipe.expand import Expanded, expand
from pluribus.recipe.run import Planned, describe, dry_run, dry_run_text, load, plan, run
from pluribus.recipe.schema import Recipe

__all__ = [
    "Expanded",
    "Planned",
    "Recipe",
    "describe",
    "dry_run",
    "dry_run_text",
    "expand",
    "load",
    "plan",
    "run",
]

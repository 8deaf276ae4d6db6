"""What differs beside the tensors: config.json, tokenizer and other small files, tied names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pluribus.core.weights import Weights, carried_files


def settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    """Return the keys of two configurations that differ, with both values; none without both."""
    if not one or not other:
        return ()
    keys = dict.fromkeys([*one, *other])
    return tuple((k, one.get(k), other.get(k)) for k in keys if one.get(k) != other.get(k))


def files(one: Path | None, other: Path | None) -> tuple[tuple[str, str], ...]:
    """Return which small files differ: tokenizer, generation settings, templates."""
    if one is None or other is None:
        return ()
    mine, theirs = ({f.name: f for f in carried_files(folder)} for folder in (one, other))
    out = []
    for name in sorted({*mine, *theirs} - {"config.json", "README.md"}):
        if name not in theirs:
            out.append((name, "removed"))
        elif name not in mine:
            out.append((name, "added"))
        elif mine[name].read_bytes() != theirs[name].read_bytes():
            out.append((name, _vocabulary(mine[name], theirs[name]) or "changed"))
    return tuple(out)


def _vocabulary(one: Path, other: Path) -> str:
    """Say how the vocabularies of two tokenizer.json differ, if that is what they are."""
    if one.name != "tokenizer.json":
        return ""
    try:
        left, right = (_tokens(json.loads(path.read_text("utf-8"))) for path in (one, other))
    except (ValueError, TypeError, AttributeError, KeyError):
        return ""
    gone, new = len(left.keys() - right.keys()), len(right.keys() - left.keys())
    moved = sum(left[token] != right[token] for token in left.keys() & right.keys())
    if not (gone or new or moved):
        return "changed, with the same vocabulary"
    return f"changed: {new} tokens added, {gone} removed, {moved} renumbered"


def _tokens(told: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = told["model"]["vocab"]
    if isinstance(vocabulary, list):  # of (token, score)
        found = {str(pair[0]): number for number, pair in enumerate(vocabulary)}
    else:
        found = dict(vocabulary)
    return found | {str(one["content"]): one["id"] for one in told.get("added_tokens") or ()}


def ties(one: Weights, other: Weights) -> tuple[str, ...]:
    """Return which names stand for one tensor in one model and for two in the other."""
    out = []
    for label, tied, apart in ((one.label, one, other), (other.label, other, one)):
        names = [n for n, to in tied.aliases.items() if n in apart.spec and to in apart.spec]
        for name in names:
            out.append(f"{name} is tied to {tied.aliases[name]} in {label}, but not in the other")
    return tuple(out)

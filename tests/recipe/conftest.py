"""Tiny models, made importable: tests are collected without a package."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Return a folder with three models, and a few odd ones."""
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate("abc"):
        tiny.model(root / name, seed=i, base=0 if i else None)
    tiny.model(root / "deep", seed=3, layers=6)
    tiny.model(root / "mistral", seed=4, kind="mistral")
    tiny.model(root / "wide", seed=5, words=[*tiny.WORDS, "more"])
    tiny.model(root / "tied", seed=6, head=False)
    tiny.save(root / "bare.safetensors", tiny.tensors(4, 14, 9))
    return root

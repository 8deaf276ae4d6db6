import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def real_data(monkeypatch):
    """The folder with the real sets: the one the caller set, or the one beside the checkout."""
    folder = Path(os.environ.get("PLURIBUS_DATA") or SHARED)
    if not (folder / "vision" / "mnist.npz").is_file():
        pytest.skip(f"needs the real image sets: no vision/mnist.npz in {folder}")
    monkeypatch.setenv("PLURIBUS_DATA", str(folder))
    return folder


@pytest.fixture
def own_folders(monkeypatch, tmp_path):
    """Data and cache folders of the test's own."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    monkeypatch.setenv("PLURIBUS_DATA", str(data))
    monkeypatch.setenv("PLURIBUS_CACHE", str(cache))
    return data, cache

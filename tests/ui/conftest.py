"""The helpers of these tests by their bare name, and small models to look at."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a base and two experts."""
    from pluribus.core.weights import Weights

    for number, name in enumerate(("base", "one", "two")):
        draw = np.random.default_rng(number)
        weights = {"w": draw.standard_normal((16, 8)).astype(np.float32)}
        Weights.of(weights).save(tmp_path / f"{name}.safetensors")
    return tmp_path

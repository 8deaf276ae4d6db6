"""Chance for tests, from a fixed seed."""

import numpy as np
import pytest


@pytest.fixture
def rng_numpy():
    return np.random.default_rng(0)

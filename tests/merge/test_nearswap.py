import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.nearswap import NearSwap

from .conftest import merged


def test_worked_by_hand():
    out = merged(NearSwap(t=0.5), [0, 0, 0, 1], [0.25, 2, -4, 1])
    np.testing.assert_allclose(out, [0.25, 0.5, -0.5, 1], rtol=1e-6)


def test_it_clips_the_update():
    base, expert = np.random.default_rng(9).normal(size=(2, 100))
    expected = base + np.clip(expert - base, -0.3, 0.3)
    np.testing.assert_allclose(merged(NearSwap(t=0.3), base, expert), expected, atol=1e-6)


def test_t_of_zero_changes_nothing():
    base, expert = np.random.default_rng(9).normal(size=(2, 100)).astype(np.float32)
    np.testing.assert_array_equal(merged(NearSwap(t=0), base, expert), base)


def test_bad_t():
    with pytest.raises(InputError, match="nearswap: t = -1"):
        NearSwap(t=-1)
    with pytest.raises(TypeError, match="'t'"):
        NearSwap()

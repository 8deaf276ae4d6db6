import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.ema import Ema


def merged(method, *experts):
    return merge_arrays(method, None, [{"x": np.array(e, np.float32)} for e in experts])["x"]


def test_worked_by_hand():
    # 8 -> 0.5 * 8 + 0.5 * 4 = 6 -> 0.5 * 6 + 0.5 * 0 = 3
    np.testing.assert_array_equal(merged(Ema(decay=0.5), [8, 1], [4, 1], [0, 1]), [3, 1])


def test_equals_a_weighted_sum():
    rng = np.random.default_rng(0)
    experts = rng.standard_normal((4, 9)).astype(np.float32)
    weights = [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    expected = sum(w * e for w, e in zip(weights, experts, strict=True))
    np.testing.assert_allclose(merged(Ema(decay=0.9), *experts), expected, rtol=1e-5, atol=1e-6)


def test_ends():
    np.testing.assert_array_equal(merged(Ema(decay=0.0), [8], [4]), [4])
    np.testing.assert_array_equal(merged(Ema(decay=1.0), [8], [4]), [8])


def test_order_matters():
    assert merged(Ema(decay=0.9), [8], [4]) != merged(Ema(decay=0.9), [4], [8])


def test_decay_out_of_range():
    with pytest.raises(InputError, match=r"ema: decay = 1\.5"):
        Ema(decay=1.5)

import numpy as np

from pluribus.engine.reference import merge_arrays
from pluribus.merge.expo import Expo

BASE = {"x": np.array([1.0, -1.0, 0.3], np.float32)}
ONE = {"x": np.array([2.0, -1.0, 0.1], np.float32)}
TWO = {"x": np.array([4.0, -3.0, 0.1], np.float32)}


def test_worked_by_hand():
    out = merge_arrays(Expo(alpha=0.5), BASE, [ONE])["x"]
    np.testing.assert_allclose(out, [2.5, -1.0, 0.0], atol=1e-7)
    assert out.dtype == np.float32


def test_several_experts_are_averaged_first():
    out = merge_arrays(Expo(alpha=1.0), BASE, [ONE, TWO])["x"]
    np.testing.assert_allclose(out, [5.0, -3.0, -0.1], atol=1e-7)


def test_alpha_zero_gives_the_expert_to_the_bit():
    np.testing.assert_array_equal(merge_arrays(Expo(alpha=0.0), BASE, [ONE])["x"], ONE["x"])


def test_is_base_plus_one_and_alpha_times_the_update():
    out = merge_arrays(Expo(alpha=0.25), BASE, [ONE])["x"]
    np.testing.assert_allclose(out, BASE["x"] + 1.25 * (ONE["x"] - BASE["x"]), rtol=1e-6)

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.passthrough import Passthrough

from .conftest import merged


def test_a_copy_bit_for_bit():
    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    np.testing.assert_array_equal(merged(Passthrough(), None, x), x)


@pytest.mark.parametrize("scale", [0.5, (0.5,), 0.0])
def test_scaled(scale):
    factor = scale[0] if isinstance(scale, tuple) else scale
    out = merged(Passthrough(scale=scale), None, [2, -4])
    np.testing.assert_array_equal(out, np.array([2, -4], np.float32) * factor)
    assert out.dtype == np.float32


def test_too_many_scales():
    with pytest.raises(InputError, match="2 values were given for 1 experts"):
        merged(Passthrough(scale=(1.0, 2.0)), None, [1.0])

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.merger import At
from pluribus.core.random import uniform
from pluribus.merge.dare_ties import DareTies

from .conftest import merged


def test_density_one_elects_and_adds():
    # element 0: 3 - 1 > 0, the minus is erased; element 1: tie, + wins; element 2: both agree
    out = merged(DareTies(), [0, 0, 0], [3, 2, -1], [-1, -2, -2])
    np.testing.assert_array_equal(out, np.array([3, 2, -3], np.float32))


def test_normalised_by_the_weights_that_agree():
    out = merged(DareTies(normalize=True, weight=(1.0, 3.0)), [0, 0], [4, 4], [4, -1])
    np.testing.assert_array_equal(out, np.array([4, 4], np.float32))


@pytest.mark.parametrize("rescale_by", ["l1", "1/p"])
def test_equals_the_formula_on_the_documented_draws(rescale_by):
    rng = np.random.default_rng(16)
    base, *experts = rng.normal(size=(4, 500)).astype(np.float32)
    tau = np.array([expert - base for expert in experts], np.float64)
    at = At("x", (500,), 0, 500)
    keep = np.array([uniform(at, t, base) < np.float32(0.4) for t in range(3)])
    norms = abs(tau).sum(1) / abs(tau * keep).sum(1)
    tau = tau * keep * (norms[:, None] if rescale_by == "l1" else 1 / 0.4)
    sign = np.where(tau.sum(0) >= 0, 1, -1)
    expected = base + (tau * (np.sign(tau) == sign)).sum(0)
    method = DareTies(density=0.4, rescale_by=rescale_by)
    np.testing.assert_allclose(merged(method, base, *experts), expected, atol=2e-6)


def test_bad_parameters():
    with pytest.raises(InputError, match="negative weights need normalize: false"):
        DareTies(weight=(1.0, -1.0), normalize=True)
    assert DareTies(weight=(1.0, -1.0)).weight == (1.0, -1.0)
    with pytest.raises(InputError, match="dare_ties: density = 0"):
        DareTies(density=0)

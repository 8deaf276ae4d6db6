import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.merger import At
from pluribus.core.random import uniform
from pluribus.merge.della import Della

from .conftest import merged
from .test_della_linear import chances


def test_density_one_elects_and_averages():
    out = merged(Della(weight=(1.0, 3.0)), [[0, 0, 0]], [[4, 2, -1]], [[-1, -2, -5]])
    # weighted votes 4 - 3 > 0; 2 - 6 < 0; both minus: (-1 - 15) / 4
    np.testing.assert_array_equal(out, np.array([[4, -2, -4]], np.float32))


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_formula_on_the_documented_draws(normalize):
    rng = np.random.default_rng(19)
    base, *experts = rng.normal(size=(4, 20, 9)).astype(np.float32)
    weights = np.array([0.2, 0.5, 0.9])[:, None, None]
    tau = np.array([expert - base for expert in experts], np.float64)
    for t in range(3):
        draws = uniform(At("x", (20, 9), 0, 180), t, base).reshape(20, 9)
        keep = draws < chances(tau[t].astype(np.float32), 0.4, 0.2)
        tau[t] *= keep * abs(tau[t]).sum() / abs(tau[t] * keep).sum()
    votes = tau * weights
    agrees = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    total = (votes * agrees).sum(0)
    if normalize:
        total = total / np.where(agrees.any(0), (weights * agrees).sum(0), 1)
    method = Della(density=0.4, epsilon=0.2, weight=(0.2, 0.5, 0.9), normalize=normalize)
    np.testing.assert_allclose(merged(method, base, *experts), base + total, atol=3e-6)


def test_bad_parameters():
    with pytest.raises(InputError, match="negative weights need normalize: false"):
        Della(weight=-1.0)
    with pytest.raises(InputError, match=r"della: density = 0\.9 and epsilon = 0\.15"):
        Della(density=0.9)

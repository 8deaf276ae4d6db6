import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.breadcrumbs import Breadcrumbs
from pluribus.merge.breadcrumbs_ties import BreadcrumbsTies

from .conftest import merged


def test_worked_by_hand():
    # each drops its largest of four and keeps two: {3, -2} and {-3, -2}
    out = merged(
        BreadcrumbsTies(density=0.5, gamma=0.25), np.zeros(4), [3, -2, 1, 9], [-9, -3, 1, -2]
    )
    np.testing.assert_array_equal(out, [3, -5, 0, -2])


def test_normalised_by_the_weights_that_agree():
    method = BreadcrumbsTies(normalize=True, weight=(1.0, 3.0))
    np.testing.assert_array_equal(merged(method, [0, 0], [4, 4], [8, -1]), [7, 4])


def test_a_vote_that_cancels_is_plus():
    np.testing.assert_array_equal(merged(BreadcrumbsTies(), [0], [2], [-2]), [2])


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
def test_equals_the_band_then_the_vote(scope):
    base, *experts = np.random.default_rng(21).normal(size=(4, 6, 10))
    given = {"density": 0.5, "gamma": 0.1, "scope": scope}
    tau = [
        merged(Breadcrumbs(**given), 0 * base, expert - base, dtype=np.float64)
        for expert in experts
    ]
    tau = np.array(tau)
    agrees = np.sign(tau) == np.where(tau.sum(0) >= 0, 1, -1)
    out = merged(BreadcrumbsTies(scale=0.7, **given), base, *experts, dtype=np.float64)
    np.testing.assert_allclose(out, base + 0.7 * (tau * agrees).sum(0), atol=1e-12)


def test_bad_parameters():
    with pytest.raises(InputError, match=r"breadcrumbs_ties: .*exceed 1"):
        BreadcrumbsTies(density=0.9, gamma=0.3)
    with pytest.raises(InputError, match="negative weights need normalize: false"):
        BreadcrumbsTies(weight=-1.0, normalize=True)
    assert BreadcrumbsTies(weight=-1.0).weight == -1

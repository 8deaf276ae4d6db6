import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.merge.sce import Sce, variance

from .conftest import merged


def slow(base, experts, share):
    """Select, calculate, erase on whole arrays in float64."""
    tau = np.array([expert - base for expert in experts])
    if share < 1:
        spread = tau.var(axis=0)
        spread[(tau == tau[0]).all(axis=0)] = 0
        keep = np.zeros(base.size, bool)
        keep[np.argsort(-spread, kind="stable")[: int(np.count_nonzero(spread) * share)]] = True
        tau = tau * keep
    energy = (tau**2).mean(axis=1)
    weights = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(tau), 1 / len(tau))
    sign = np.where(tau.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(tau) == sign
    divisor = np.maximum((weights[:, None] * agrees).sum(axis=0), 1e-6)
    return base + (weights[:, None] * agrees * tau).sum(axis=0) / divisor


def test_worked_by_hand():
    # energies (4 + 4) / 2 and (16 + 0) / 2: weights 1/3 and 2/3
    # element 0: 2 and 4 agree: (2/3 + 8/3) / 1; element 1: only the first moved it
    np.testing.assert_allclose(merged(Sce(), [1, 1], [3, 3], [5, 1]), [1 + 10 / 3, 3], rtol=1e-6)


def test_the_minority_is_erased():
    # sum -2 in element 0: the second's sign wins, alone
    np.testing.assert_allclose(merged(Sce(), [0, 0], [2, 1], [-4, 1]), [-4, 1], rtol=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 1.0])
def test_equals_the_slow_form(share):
    rng = np.random.default_rng(13)
    base = rng.normal(size=90)
    experts = [base + rng.normal(size=90) * (rng.random(90) < 0.6) for _ in range(3)]
    out = merged(Sce(select_topk=share), base, *experts, dtype=np.float64)
    np.testing.assert_allclose(out, slow(base, experts, share), atol=1e-9)


def test_the_share_counts_elements_with_variance_only():
    # elements 0..3 agree in both; of the two others half, the one further apart, stays
    base = np.zeros(6)
    a, b = [1, 1, 1, 1, 2, 1], [1, 1, 1, 1, -1, -1.5]
    out = merged(Sce(select_topk=0.5), base, a, b)
    assert np.flatnonzero(out).tolist() == [4]


def test_variance_of_equal_updates_is_exactly_zero():
    x = np.random.default_rng(14).normal(size=1000).astype(np.float32)
    assert not variance(0 * x, np.stack([x] * 7)).any()


def test_small_updates_weigh_the_same():
    out = merged(Sce(), [0, 0], [1e-4, 0], [3e-4, 0], dtype=np.float64)
    np.testing.assert_allclose(out, [2e-4, 0], rtol=1e-9)


def test_nothing_selected_leaves_the_base():
    np.testing.assert_array_equal(merged(Sce(select_topk=0.0), [1, 2], [2, 3], [0, 9]), [1, 2])


def test_bad_share():
    for share in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"sce: select_topk = {share}"):
            Sce(select_topk=share)

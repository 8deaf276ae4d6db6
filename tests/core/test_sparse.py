import numpy as np
import pytest
import torch

from pluribus.core.errors import InputError
from pluribus.core.merger import At
from pluribus.core.sparse import (
    add_up,
    agreeing,
    band,
    chances_by_rank,
    combine,
    disjoint,
    drawn,
    elected,
    l1_factors,
    rank,
    refuse_negative,
    top_of_rows,
    total_weight,
    weighted_sum,
)

TAU = np.array([[3, -1, 0, 2], [-1, -1, 0, -2]], np.float32)


@pytest.fixture(params=["numpy", "torch"])
def array(request):
    """Make an array of either kind."""
    if request.param == "numpy":
        return lambda values: np.array(values, np.float32)
    return lambda values: torch.tensor(np.array(values, np.float32))


def test_sums(array):
    np.testing.assert_array_equal(add_up(array(TAU)), [2, -2, 0, 0])
    np.testing.assert_array_equal(weighted_sum(array(TAU), [2, 0.5]), [5.5, -2.5, 0, 3])
    assert weighted_sum(array(TAU), np.array([2, 0.5])).dtype == array(TAU).dtype


def test_a_sum_is_the_same_in_every_block():
    """numpy adds long axes in pairs, but only where memory lies so: one column would differ."""
    rows = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
    one_by_one = np.concatenate([add_up(rows[:, [k]]) for k in range(7)])
    np.testing.assert_array_equal(one_by_one, add_up(rows))


def test_band_counts():
    np.testing.assert_array_equal(band(0.3, 0.2)(10, 2), [[5, 2]] * 2)
    np.testing.assert_array_equal(band(0.3, 0.2, outlier_first=False)(10, 1), [[3, 2]])
    np.testing.assert_array_equal(band((1.0, 0.5), (0.3, 0.5))(11, 2), [[11, 0], [10, 5]])
    assert band(0.5, 0.1)(0, 0).shape == (0, 2)


def test_rank_and_top_break_ties_by_place(array):
    values = array([[[2, 1, 2, 0]], [[5, 5, 5, 6]]])
    np.testing.assert_array_equal(rank(values), [[[2, 1, 3, 0]], [[0, 1, 2, 3]]])
    keep = top_of_rows(values, [1, 3])
    np.testing.assert_array_equal(keep, [[[1, 0, 0, 0]], [[1, 1, 0, 1]]])
    assert not np.asarray(top_of_rows(values, [0, 0])).any()


def test_chances_by_rank(array):
    sizes = array([[[1, 3, 2]], [[1, 3, 2]]])
    found = chances_by_rank(sizes, (0.5, 1.0), 0.2)
    np.testing.assert_allclose(found, [[[0.3, 0.7, 0.5]], [[1, 1, 1]]], rtol=1e-6)
    np.testing.assert_allclose(chances_by_rank(array([[[7], [8]]]), 0.4, 0.2), [[[0.4], [0.4]]])


def test_drawn(array):
    at = At("x", (2000,), 0, 2000, seed=1)
    tau = array(np.ones((2, 2000)))
    keep = np.asarray(drawn((0.2, 0.9), tau, at))
    np.testing.assert_allclose(keep.mean(axis=1), [0.2, 0.9], atol=0.03)
    every = np.asarray(drawn(tau * 0.2, tau, at))
    np.testing.assert_array_equal(every[0], keep[0])
    assert np.asarray(drawn(1.0, tau, at)).all()


def test_l1_factors():
    before, after = np.array([6, 6, 1e-9, 6.0]), np.array([3, 0, 1e-9, 6.0])
    assert l1_factors(before, after) == (2, 1, 1, 1)


def test_election_and_disjoint_sum(array):
    tau = array(TAU)
    np.testing.assert_array_equal(elected(tau), [1, -1, 1, 1])
    np.testing.assert_array_equal(elected(tau, tie=-1.0), [1, -1, -1, -1])
    agrees = agreeing(tau, elected(tau))
    np.testing.assert_array_equal(agrees, [[1, 1, 0, 1], [0, 1, 0, 0]])
    np.testing.assert_array_equal(agreeing(tau, 0 * elected(tau)), tau < 0)
    kept, divisor = disjoint(tau, agrees, array([[2], [3]]))
    np.testing.assert_array_equal(kept, [3, -2, 0, 2])
    np.testing.assert_array_equal(divisor, [2, 5, 0, 2])


def test_combine(array):
    base, tau = array(np.ones(4)), array(TAU)

    def run(**given):
        return np.asarray(
            combine(base, tau, (1.0, 3.0), **{"scale": 1, "normalize": False, **given})
        )

    np.testing.assert_array_equal(run(), [1, -3, 1, -3])
    np.testing.assert_array_equal(run(scale=0.5), [1, -1, 1, -1])
    np.testing.assert_array_equal(run(normalize=True), [1, 0, 1, 0])
    np.testing.assert_array_equal(run(vote=True), [4, -3, 1, -5])  # the first: 3 - 3, a tie
    np.testing.assert_array_equal(run(vote=True, normalize=True), [4, 0, 1, -1])


def test_refusals():
    assert total_weight((1.0, -0.5), 2) == 0.5
    with pytest.raises(InputError, match=r"weights \(1\.0, -1\.0\) of 2 experts sum to zero"):
        total_weight((1.0, -1.0), 2)
    refuse_negative("x", (0.0, 1.0))
    with pytest.raises(InputError, match="x: weight = -1: negative weights"):
        refuse_negative("x", -1)

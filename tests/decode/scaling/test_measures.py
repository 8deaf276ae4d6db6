"""pass@k, controllability and scalability, against counting and cases worked by hand."""

from itertools import combinations

import pytest

from pluribus.core.errors import InputError
from pluribus.decode.scaling import controllability, pass_at_k, scalability


def test_pass_at_k_counts_subsets():
    for n in range(1, 8):
        for right in range(n + 1):
            for k in range(1, n + 1):
                sets = list(combinations(range(n), k))
                hold = sum(any(i < right for i in one) for one in sets)
                assert pass_at_k(n, right, k) == pytest.approx(hold / len(sets))
    assert pass_at_k(5, 3, 3) == 1.0  # two are wrong, so three always hold a right one


@pytest.mark.parametrize(("n", "right", "k"), [(4, 5, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_counts_that_cannot_be(n, right, k):
    with pytest.raises(InputError, match="give 1 <= k <= n"):
        pass_at_k(n, right, k)


def test_controllability():
    assert controllability([5, 10, 11, 20], 6, 11) == 0.5
    assert controllability([5, 10, 11, 20], most=10) == 0.5
    with pytest.raises(InputError, match="at least one run"):
        controllability([])


def test_scalability_is_the_mean_slope_of_all_pairs():
    # (1, .2), (2, .6), (4, .8): slopes .4, .2, .1
    assert scalability({4: 0.8, 1: 0.2, 2: 0.6}) == pytest.approx((0.4 + 0.2 + 0.1) / 3)
    with pytest.raises(InputError, match="two or more"):
        scalability({1: 0.2})

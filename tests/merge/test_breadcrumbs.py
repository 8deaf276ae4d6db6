import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.breadcrumbs import Breadcrumbs
from pluribus.merge.task_arithmetic import TaskArithmetic

from .conftest import merged

RNG = np.random.default_rng(20)


def middle_keep(row, keep, outlier, outlier_first=True):
    """The authors' two masks on one row, by sorting; equal sizes by place."""
    n = row.size
    out = row.copy()

    def zero(indices):
        out[indices] = 0

    if outlier_first:
        zero(np.argsort(-abs(out), kind="stable")[: int(n * outlier)])
        zero(np.argsort(-abs(out), kind="stable")[int(n * keep) :])
    else:
        top = np.argsort(-abs(row), kind="stable")
        zero(top[int(n * keep) :])
        zero(top[: int(n * outlier)])
    return out


def test_worked_by_hand():
    # 10 updates: gamma 0.2 drops 10 and 9, density 0.3 keeps 8, 7, 6
    update = np.array([1, -7, 3, 10, 2, 8, -4, 6, 9, 5])
    method = Breadcrumbs(density=0.3, gamma=0.2, weight=0.5, scale=2.0)
    out = merged(method, np.ones(10), 1 + update)
    np.testing.assert_array_equal(out - 1, [0, -7, 0, 0, 0, 8, 0, 6, 0, 0])


def test_the_experts_are_added():
    out = merged(Breadcrumbs(density=0.5, gamma=0.5), [0, 0], [5, 1], [2, 3])
    np.testing.assert_array_equal(out, [2, 1])
    out = merged(Breadcrumbs(density=0.5, gamma=0.5, normalize=True), [0, 0], [5, 1], [2, 3])
    np.testing.assert_array_equal(out, [1, 0.5])


@pytest.mark.parametrize("shape", [(), (7,), (5, 64), (8, 3, 7, 7)])
@pytest.mark.parametrize("outlier_first", [True, False])
def test_official_rows_equal_the_authors_masks(shape, outlier_first):
    update = RNG.normal(size=shape)
    rows = update.reshape(-1, shape[-1] if shape else 1)
    expected = [middle_keep(row, 0.4, 0.2, outlier_first) for row in rows]
    method = Breadcrumbs(
        density=0.4,
        gamma=0.2,
        scope="row",
        official=True,
        order="outlier_first" if outlier_first else "keep_first",
    )
    out = merged(method, 0 * update, update, dtype=np.float64)
    np.testing.assert_array_equal(out, np.array(expected).reshape(shape))


def test_kernels_have_one_row_for_each_output_channel():
    update = RNG.normal(size=(6, 4, 3, 3))
    expected = [middle_keep(row, 0.15, 0.05) for row in update.reshape(6, 36)]
    method = Breadcrumbs(density=0.15, gamma=0.05, scope="row")
    out = merged(method, 0 * update, update, dtype=np.float64)
    np.testing.assert_array_equal(out, np.array(expected).reshape(update.shape))
    official = Breadcrumbs(density=0.15, gamma=0.05, scope="row", official=True)
    assert not merged(official, 0 * update, update).any()  # int(0.15 * 3) = 0: nothing stays


@pytest.mark.parametrize("order", ["outlier_first", "keep_first"])
def test_scopes(order):
    updates = {"a": RNG.normal(size=(4, 9)), "b": 10 * RNG.normal(size=25)}
    base = {name: 0 * update for name, update in updates.items()}
    first = order == "outlier_first"
    method = Breadcrumbs(density=0.4, gamma=0.1, order=order)
    out = merge_arrays(method, base, [updates])
    for name, update in updates.items():
        expected = middle_keep(update.ravel(), 0.4, 0.1, first).reshape(update.shape)
        np.testing.assert_array_equal(out[name], expected)
    method = Breadcrumbs(density=0.4, gamma=0.1, order=order, scope="model")
    out = merge_arrays(method, base, [updates])
    whole = np.concatenate([update.ravel() for update in updates.values()])
    found = np.concatenate([value.ravel() for value in out.values()])
    np.testing.assert_array_equal(found, middle_keep(whole, 0.4, 0.1, first))


def test_equal_sizes_go_by_place():
    out = merged(Breadcrumbs(density=0.5, gamma=0.25), np.zeros(4), [1, -1, 1, 1])
    np.testing.assert_array_equal(out, [0, -1, 1, 0])


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
def test_keeping_all_is_task_arithmetic(scope):
    base, *experts = RNG.normal(size=(3, 4, 8)).astype(np.float32)
    expected = merged(TaskArithmetic(weight=0.3), base, *experts)
    method = Breadcrumbs(density=1.0, gamma=0.0, weight=0.3, scope=scope)
    np.testing.assert_array_equal(merged(method, base, *experts), expected)
    method = Breadcrumbs(density=1.0, gamma=0.3, weight=0.3, scope=scope)  # as in mergekit
    np.testing.assert_array_equal(merged(method, base, *experts), expected)


def test_keeping_the_rest_only_removes_outliers():
    update = RNG.normal(size=50)
    out = merged(Breadcrumbs(density=0.9, gamma=0.1), 0 * update, update, dtype=np.float64)
    expected = update.copy()
    expected[np.argsort(-abs(update))[:5]] = 0
    np.testing.assert_array_equal(out, expected)


def test_a_gamma_below_one_element_erases_nothing():
    """mergekit up to 0.1.4 lost the whole update where int(gamma n) = 0."""
    update = RNG.normal(size=20)
    out = merged(Breadcrumbs(density=0.5, gamma=0.01), 0 * update, update)
    assert np.count_nonzero(out) == 10


def test_a_density_below_one_element_adds_nothing():
    np.testing.assert_array_equal(merged(Breadcrumbs(density=0.1), [1, 2], [5, 5]), [1, 2])


def test_rescaling_restores_the_norm():
    update = RNG.normal(size=(6, 10)).astype(np.float32)
    for scope in ("tensor", "row"):
        method = Breadcrumbs(density=0.3, gamma=0.1, rescale=True, scope=scope)
        out = merged(method, 0 * update, update)
        assert abs(out).sum() == pytest.approx(abs(update).sum(), rel=1e-5)


@pytest.mark.parametrize("density", [0, -0.1, 1.5])
def test_bad_density(density):
    with pytest.raises(InputError, match="breadcrumbs: density"):
        Breadcrumbs(density=density)


@pytest.mark.parametrize("gamma", [-0.1, 1, 1.5])
def test_bad_gamma(gamma):
    with pytest.raises(InputError, match=r"breadcrumbs: .*gamma"):
        Breadcrumbs(gamma=gamma, density=0.5)


def test_more_than_all():
    with pytest.raises(InputError, match=r"exceed 1; lower gamma to 0\.1 or density to 0\.7"):
        Breadcrumbs(density=0.9, gamma=0.3)
    with pytest.raises(InputError, match=r"density = 0\.9 and gamma = 0\.3"):
        Breadcrumbs(density=(0.5, 0.9), gamma=0.3)
    assert Breadcrumbs(density=0.9, gamma=0.1).gamma == 0.1  # exactly all


def test_weights_that_cancel():
    with pytest.raises(InputError, match="sum to zero"):
        merged(Breadcrumbs(weight=(1.0, -1.0), normalize=True), [0.0], [1.0], [2.0])

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.merger import At
from pluribus.core.random import uniform
from pluribus.merge.della_linear import DellaLinear
from pluribus.merge.task_arithmetic import TaskArithmetic

from .conftest import merged


def chances(tau, density, epsilon):
    """By sorting: the i-th smallest of c stays with density - epsilon + 2 epsilon i/(c-1)."""
    out = np.empty(tau.shape)
    for row, chance in zip(abs(tau), out, strict=True):
        for place, index in enumerate(np.argsort(row, kind="stable")):
            chance[index] = density - epsilon + 2 * epsilon * place / (row.size - 1)
    return out


@pytest.mark.parametrize("rescale_by", ["l1", "1/p"])
def test_equals_the_formula_on_the_documented_draws(rescale_by):
    rng = np.random.default_rng(17)
    base, x = rng.normal(size=(2, 30, 11)).astype(np.float32)
    tau = x - base
    p = chances(tau, 0.5, 0.3)
    keep = uniform(At("x", (30, 11), 0, 330), 0, base).reshape(30, 11) < p
    factor = abs(tau).sum() / abs(tau * keep).sum() if rescale_by == "l1" else 1 / p
    method = DellaLinear(density=0.5, epsilon=0.3, scale=0.7, rescale_by=rescale_by)
    expected = base + 0.7 * factor * tau * keep
    np.testing.assert_allclose(merged(method, base, x), expected, atol=2e-6)


def test_large_updates_stay_more_often():
    x = np.tile(np.arange(1, 6, dtype=np.float32), (4000, 1))
    kept = merged(DellaLinear(density=0.5, epsilon=0.4, rescale=False), 0 * x, x) != 0
    np.testing.assert_allclose(kept.mean(axis=0), [0.1, 0.3, 0.5, 0.7, 0.9], atol=0.03)


def test_no_epsilon_is_the_same_chance_for_all():
    x = np.tile(np.arange(1, 6, dtype=np.float32), (4000, 1))
    kept = merged(DellaLinear(density=0.3, epsilon=0.0, rescale=False), 0 * x, x) != 0
    np.testing.assert_allclose(kept.mean(axis=0), np.full(5, 0.3), atol=0.03)


def test_density_one_is_task_arithmetic():
    base, x = np.random.default_rng(18).normal(size=(2, 4, 5))
    out = merged(DellaLinear(weight=0.4), base, x)
    np.testing.assert_array_equal(out, merged(TaskArithmetic(weight=0.4), base, x))


def test_single_elements_stay_with_the_mean_chance():
    column = np.ones((4000, 1), np.float32)
    kept = merged(DellaLinear(density=0.3, epsilon=0.2, rescale=False), 0 * column, column) != 0
    assert abs(kept.mean() - 0.3) < 0.03


@pytest.mark.parametrize(
    ("density", "epsilon"),
    [(0.9, 0.15), (0.1, 0.1), (0.5, 0.5), ((0.5, 0.95), 0.1), (0.5, (0.1, 0.6))],
)
def test_chances_outside_zero_and_one(density, epsilon):
    with pytest.raises(InputError, match="must lie between 0 and 1; try epsilon below"):
        DellaLinear(density=density, epsilon=epsilon)


def test_bad_density():
    with pytest.raises(InputError, match=r"della_linear: density = 1\.2"):
        DellaLinear(density=1.2)

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.merger import At
from pluribus.core.random import uniform
from pluribus.merge.dare_linear import DareLinear
from pluribus.merge.task_arithmetic import TaskArithmetic

from .conftest import merged

RNG = np.random.default_rng(15)
BASE = RNG.normal(size=2000).astype(np.float32)
EXPERTS = [(BASE + RNG.normal(0, 0.1, 2000)).astype(np.float32) for _ in range(2)]


def masks(density, seed=0):
    """What stays, by the documented draw: stream t, one number an element."""
    at = At("x", (2000,), 0, 2000, seed=seed)
    return [uniform(at, t, BASE) < np.float32(density) for t in range(2)]


def test_equals_the_formula_on_the_documented_draws():
    tau = [expert - BASE for expert in EXPERTS]
    for rescale_by in ("l1", "1/p"):
        expected = BASE.astype(np.float64)
        for weight, t, keep in zip((0.7, 0.4), tau, masks(0.3), strict=True):
            factor = abs(t).sum() / abs(t * keep).sum() if rescale_by == "l1" else 1 / 0.3
            expected = expected + 0.5 * weight * factor * t * keep
        method = DareLinear(density=0.3, weight=(0.7, 0.4), scale=0.5, rescale_by=rescale_by)
        np.testing.assert_allclose(merged(method, BASE, *EXPERTS), expected, atol=1e-6)


def test_each_expert_has_its_own_density():
    method = DareLinear(density=(0.1, 1.0), weight=(1.0, 0.0), rescale=False)
    share = (merged(method, BASE, *EXPERTS) != BASE).mean()
    assert abs(share - 0.1) < 0.03
    method = DareLinear(density=(0.1, 1.0), weight=(0.0, 1.0))
    np.testing.assert_allclose(merged(method, BASE, *EXPERTS), EXPERTS[1], atol=1e-6)


def test_the_norm_is_kept_in_every_draw():
    for seed in range(5):
        update = merged(DareLinear(density=0.2), 0 * BASE, EXPERTS[0], seed=seed)
        assert abs(update).sum() == pytest.approx(abs(EXPERTS[0]).sum(), rel=1e-5)


def test_the_papers_factor_keeps_the_mean_over_draws():
    x = np.array([1, -2, 3], np.float32)
    method = DareLinear(density=0.25, rescale_by="1/p")
    mean = np.mean([merged(method, 0 * x, x, seed=s) for s in range(4000)], axis=0)
    np.testing.assert_allclose(mean, x, rtol=0.1)


def test_density_one_is_task_arithmetic():
    out = merged(DareLinear(weight=(0.3, 0.6)), BASE, *EXPERTS)
    np.testing.assert_array_equal(out, merged(TaskArithmetic(weight=(0.3, 0.6)), BASE, *EXPERTS))


def test_experts_are_dropped_independently():
    a, b = masks(0.5)
    assert abs((a & b).mean() - 0.25) < 0.05


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, (0.5, 2.0)])
def test_bad_density(density):
    with pytest.raises(InputError, match="dare_linear: density"):
        DareLinear(density=density)


def test_weights_that_cancel():
    with pytest.raises(InputError, match="sum to zero"):
        merged(DareLinear(weight=(1.0, -1.0), normalize=True), BASE, *EXPERTS)


def test_nothing_survives():
    """A tensor whose every update is dropped keeps the base; nothing is divided by zero."""
    seed = next(s for s in range(99) if uniform(At("x", (1,), 0, 1, seed=s), 0, BASE[:1]) > 0.5)
    assert merged(DareLinear(density=0.1), [1.0], [2.0], seed=seed) == 1

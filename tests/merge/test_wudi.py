import numpy as np
import pytest
import torch

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.wudi import Wudi


def models(shape, count=3, seed=0, size=0.1):
    rng = np.random.default_rng(seed)
    base = np.asarray(rng.standard_normal(shape), np.float32)
    return {"w": base}, [
        {"w": np.asarray(base + size * rng.standard_normal(shape), np.float32)}
        for _ in range(count)
    ]


def loss_of(tau, taus):
    """Equation 8, term by term."""
    total = 0.0
    for own in taus:
        total = total + ((tau - own) @ own.T).square().sum() / own.square().sum()
    return total


@pytest.mark.parametrize("steps", [1, 25])
def test_agrees_with_autograd_and_torchs_adam(steps):
    base, experts = models((6, 9))
    taus = [torch.from_numpy(e["w"] - base["w"]) for e in experts]
    tau = torch.nn.Parameter(sum(taus))
    adam = torch.optim.Adam([tau], lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        loss_of(tau, taus).backward()
        adam.step()
    out = merge_arrays(Wudi(steps=steps, lr=1e-2, scale=0.5), base, experts)["w"]
    np.testing.assert_allclose(out, base["w"] + 0.5 * tau.detach().numpy(), atol=1e-5)
    assert out.dtype == np.float32


def test_the_exact_solver_reaches_the_minimum():
    base, experts = models((6, 9))
    taus = [torch.from_numpy(e["w"] - base["w"]).double() for e in experts]
    out = merge_arrays(Wudi(solver="exact"), base, experts)["w"]
    tau = torch.nn.Parameter(torch.from_numpy(out - base["w"]).double())
    loss = loss_of(tau, taus)
    loss.backward()
    assert tau.grad.abs().max() < 1e-5
    assert loss < loss_of(sum(taus), taus)


def test_the_exact_solver_keeps_the_sum_where_no_task_looks():
    base = {"w": np.zeros((2, 3), np.float32)}
    one, two = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    one[0, 0], two[1, 1] = 2, 3  # disjoint inputs: the sum is already free of interference
    out = merge_arrays(Wudi(solver="exact"), base, [{"w": one}, {"w": two}])["w"]
    np.testing.assert_allclose(out, one + two, atol=1e-6)


def test_steps_lower_the_interference():
    base, experts = models((16, 16), size=1e-3)
    taus = [torch.from_numpy(e["w"] - base["w"]) for e in experts]
    out = merge_arrays(Wudi(steps=300), base, experts)["w"]
    assert loss_of(torch.from_numpy(out - base["w"]), taus) < 0.5 * loss_of(sum(taus), taus)


def test_a_task_that_changed_nothing_adds_no_term():
    base, experts = models((4, 5), count=2)
    out = merge_arrays(Wudi(steps=5), base, [*experts, base])["w"]
    expected = merge_arrays(Wudi(steps=5), base, experts)["w"]
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_experts_equal_to_the_base_give_it(solver):
    base, _ = models((4, 5))
    out = merge_arrays(Wudi(solver=solver, steps=3), base, [base, base])["w"]
    np.testing.assert_array_equal(out, base["w"])


@pytest.mark.parametrize("shape", [(7,), (), (0, 3)])
def test_other_tensors_are_averaged(shape):
    base, experts = models(shape)
    expected = base["w"] + np.mean([e["w"] - base["w"] for e in experts], axis=0)
    np.testing.assert_allclose(merge_arrays(Wudi(), base, experts)["w"], expected, atol=1e-6)


def test_same_bits_twice():
    base, experts = models((6, 9))
    one, two = (merge_arrays(Wudi(steps=20), base, experts)["w"] for _ in "ab")
    np.testing.assert_array_equal(one, two)


def test_float64_stays_float64():
    base, experts = models((3, 4))
    wide = [{"w": m["w"].astype(np.float64)} for m in (base, *experts)]
    out = merge_arrays(Wudi(steps=5), wide[0], wide[1:])["w"]
    assert out.dtype == np.float64


def test_steps_out_of_range():
    with pytest.raises(InputError, match="wudi: steps = 0"):
        Wudi(steps=0)

import numpy as np
import pytest
import torch

from pluribus.engine.reference import merge_arrays
from pluribus.merge.iso_c import IsoC


def models(shape, count=3, seed=0):
    rng = np.random.default_rng(seed)
    base = np.asarray(rng.standard_normal(shape), np.float32)
    return {"w": base}, [
        {"w": np.asarray(base + 0.1 * rng.standard_normal(shape), np.float32)} for _ in range(count)
    ]


def slow(base, experts, scale):
    """The paper's formula by numpy's SVD, in float64."""
    tau = sum(e.astype(np.float64) - base for e in experts)
    u, s, vh = np.linalg.svd(tau, full_matrices=False)
    return base + scale * u @ np.diag(np.full(len(s), s.sum() / len(s))) @ vh


def test_worked_by_hand():
    base = {"w": np.zeros((2, 2), np.float32)}
    experts = [{"w": np.diag(d).astype(np.float32)} for d in ([3.0, 0.0], [0.0, -1.0])]
    # The sum is diag(3, -1): singular values 3 and 1, mean 2, signs kept.
    np.testing.assert_allclose(
        merge_arrays(IsoC(), base, experts)["w"], np.diag([2.0, -2.0]), atol=1e-6
    )


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (1, 7)])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_agrees_with_the_formula(shape, scale):
    base, experts = models(shape)
    out = merge_arrays(IsoC(scale=scale), base, experts)["w"]
    expected = slow(base["w"], [e["w"] for e in experts], scale)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert out.dtype == np.float32


def test_merged_spectrum_is_flat_and_keeps_the_nuclear_norm():
    base, experts = models((6, 9))
    s = np.linalg.svd(merge_arrays(IsoC(), base, experts)["w"] - base["w"], compute_uv=False)
    total = np.linalg.svd(sum(e["w"] - base["w"] for e in experts), compute_uv=False)
    np.testing.assert_allclose(s, total.mean(), rtol=1e-4)


def test_further_axes_join_the_columns():
    base, experts = models((4, 2, 3))
    out = merge_arrays(IsoC(), base, experts)["w"]
    flat = merge_arrays(
        IsoC(),
        {"w": base["w"].reshape(4, 6)},
        [{"w": e["w"].reshape(4, 6)} for e in experts],
    )["w"]
    np.testing.assert_array_equal(out.reshape(4, 6), flat)


@pytest.mark.parametrize("shape", [(7,), (), (0, 3)])
def test_other_tensors_are_averaged(shape):
    base, experts = models(shape)
    out = merge_arrays(IsoC(scale=0.5), base, experts)["w"]
    expected = base["w"] + 0.5 * np.mean([e["w"] - base["w"] for e in experts], axis=0)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert out.shape == shape


def test_excluded_matrices_are_averaged():
    base, experts = models((3, 4))
    out = merge_arrays(IsoC(exclude=("w",)), base, experts)["w"]
    np.testing.assert_allclose(out, np.mean([e["w"] for e in experts], axis=0), atol=1e-6)


def test_empty_directions_stay_empty():
    base = {"w": np.zeros((3, 3), np.float32)}
    expert = {"w": np.diag([4.0, 2.0, 0.0]).astype(np.float32)}
    np.testing.assert_allclose(
        merge_arrays(IsoC(), base, [expert])["w"], np.diag([3.0, 3.0, 0.0]), atol=1e-6
    )


def test_equal_experts_give_the_base_to_the_bit():
    base, _ = models((4, 5))
    np.testing.assert_array_equal(merge_arrays(IsoC(), base, [base, base])["w"], base["w"])


def test_torch_gives_what_numpy_gives():
    base, experts = models((4, 5))
    as_torch = [{"w": torch.from_numpy(m["w"])} for m in (base, *experts)]
    out = merge_arrays(IsoC(), as_torch[0], as_torch[1:])["w"]
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), merge_arrays(IsoC(), base, experts)["w"])

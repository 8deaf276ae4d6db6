import numpy as np
import pytest
import torch

from pluribus.core.errors import InputError, RecipeError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.knots import Knots
from pluribus.merge.linear import Linear
from pluribus.merge.magmax import MagMax
from pluribus.merge.ties import Ties


def models(shape=(10, 12), count=3, rank=2, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    return {"w": base}, [
        {
            "w": (
                base + rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
            ).astype(np.float32)
        }
        for _ in range(count)
    ]


def test_a_linear_inner_method_is_untouched_by_the_rotation():
    base, experts = models()
    weight = (0.2, 0.5, 0.7)
    out = merge_arrays(Knots(inner=Linear(weight=weight, normalize=False)), base, experts)["w"]
    expected = base["w"] + sum(
        w * (e["w"] - base["w"]) for w, e in zip(weight, experts, strict=True)
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert out.dtype == np.float32


@pytest.mark.parametrize("aligned", ["scaled", "plain"])
def test_agrees_with_the_steps_one_by_one(aligned):
    base, experts = models()
    tau = [e["w"].astype(np.float64) - base["w"] for e in experts]
    u, s, vh = np.linalg.svd(np.concatenate(tau, axis=1), full_matrices=False)
    k = int((s > 1e-6 * s[0]).sum())
    vs = np.split(vh[:k], 3, axis=1)
    rows = [np.diag(s[:k]) @ v if aligned == "scaled" else v for v in vs]
    best = rows[0]
    for row in rows[1:]:
        best = np.where(abs(row) >= abs(best), row, best)  # MagMax
    left = u[:, :k] if aligned == "scaled" else u[:, :k] * s[:k]
    method = Knots(inner=MagMax(), scale=0.5, aligned=aligned)
    out = merge_arrays(method, base, experts)["w"]
    np.testing.assert_allclose(out, base["w"] + 0.5 * left @ best, atol=1e-4)


def test_inner_by_name_has_its_own_parameters():
    base, experts = models()
    one = merge_arrays(Knots(inner=Ties(density=1.0)), base, experts)["w"]
    np.testing.assert_array_equal(merge_arrays(Knots(inner="ties"), base, experts)["w"], one)
    given = {"merge_method": "ties", "parameters": {"density": 0.2}}
    out = merge_arrays(Knots(inner=given), base, experts)["w"]
    other = merge_arrays(Knots(inner=Ties(density=0.2)), base, experts)["w"]
    np.testing.assert_array_equal(out, other)
    assert not np.array_equal(out, one)


def test_vectors_go_to_the_inner_method_as_they_are():
    rng = np.random.default_rng(0)
    base = {"b": rng.standard_normal(7).astype(np.float32)}
    experts = [{"b": rng.standard_normal(7).astype(np.float32)} for _ in range(3)]
    out = merge_arrays(Knots(inner=Ties(density=0.5)), base, experts)["b"]
    np.testing.assert_allclose(out, merge_arrays(Ties(density=0.5), base, experts)["b"], atol=1e-6)


def test_experts_equal_to_the_base_give_it_to_the_bit():
    base, _ = models()
    np.testing.assert_array_equal(merge_arrays(Knots(), base, [base, base])["w"], base["w"])


def test_torch_agrees_with_numpy():
    base, experts = models()
    turned = [{"w": torch.from_numpy(m["w"])} for m in (base, *experts)]
    out = merge_arrays(Knots(inner=Linear()), turned[0], turned[1:])["w"]
    assert isinstance(out, torch.Tensor)
    expected = merge_arrays(Knots(inner=Linear()), base, experts)["w"]
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)


def test_inner_method_that_does_not_exist():
    with pytest.raises(RecipeError, match="Did you mean 'ties'"):
        Knots(inner="tiess")


def test_inner_method_that_needs_data():
    with pytest.raises(InputError, match="needs more than the updates"):
        Knots(inner="fisher")

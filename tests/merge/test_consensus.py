import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.consensus import Consensus
from pluribus.merge.steps.consensus import tall_mask
from pluribus.merge.ties import Ties

T = 4


@pytest.fixture
def models():
    rng = np.random.default_rng(2)
    base = {
        "a": rng.standard_normal((40, 10)).astype(np.float32),
        "b": rng.standard_normal(33).astype(np.float32),
    }
    experts = [
        {
            n: b + np.float32(0.1) * rng.standard_t(2, b.shape).astype(np.float32)
            for n, b in base.items()
        }
        for _ in range(T)
    ]
    return base, experts


def masks(base, experts, multi, mask_lambda):
    """The published rule, with whole weights instead of differences."""
    return np.stack([abs(base - e) > mask_lambda * abs(base + multi - e) for e in experts])


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("mask_lambda", [0.2, 0.6, 1.0])
def test_the_published_rule(models, k, mask_lambda):
    base, experts = models
    merged = merge_arrays(Consensus(k=k, mask_lambda=mask_lambda, scale=0.7), base, experts)
    for name in base:
        b = base[name].astype(np.float64)
        e = np.stack([x[name].astype(np.float64) for x in experts])
        multi = (e - b).sum(0)
        agree = masks(b, e, multi, mask_lambda).sum(0) >= k
        np.testing.assert_allclose(merged[name], b + 0.7 * agree * multi, atol=1e-5)


def test_ties_is_trimmed_over_the_model_elected_and_summed(models):
    base, experts = models
    whole = Ties(
        density=0.2, scope="model", count="official", tie="global", agg="sum", normalize=False
    )
    plain = merge_arrays(whole, base, experts)
    got = merge_arrays(Consensus(multi="ties", k=0, scale=1.0), base, experts)
    for name in base:
        assert np.array_equal(got[name], plain[name])
    masked = merge_arrays(Consensus(multi="ties", k=2, mask_lambda=0.4, scale=1.0), base, experts)
    for name in base:
        multi = plain[name] - base[name]
        agree = masks(base[name], np.stack([e[name] for e in experts]), multi, 0.4).sum(0) >= 2
        np.testing.assert_allclose(masked[name], base[name] + agree * multi, atol=1e-6)
        assert 0 < agree.mean() < 1


def test_a_lambda_for_each_expert_and_any_inner_method(models):
    base, experts = models
    method = Consensus(
        multi={"merge_method": "ties", "parameters": {"density": 0.5}},
        mask_lambda=(0.2, 0.3, 0.4, 0.5),
        k=1,
        scale=1.0,
    )
    merged = merge_arrays(method, base, experts)
    plain = merge_arrays(Ties(density=0.5), base, experts)["b"]
    whole = np.stack([e["b"] for e in experts])
    agree = tall_mask(base["b"], whole, plain - base["b"], (0.2, 0.3, 0.4, 0.5)).any(0)
    assert np.array_equal(merged["b"], np.where(agree, plain, base["b"]))
    assert Consensus(multi="trim >> sum") != Consensus(multi="sum")
    assert Consensus(multi="sum") == Consensus(multi="task_arithmetic")


def test_masks_of_identical_experts_are_full_exactly_below_one_over_t_minus_one():
    base = {"w": np.zeros(50, np.float32)}
    expert = {"w": np.linspace(0.5, 2, 50, dtype=np.float32)}
    for mask_lambda, kept in ((0.32, 1.0), (0.34, 0.0)):  # 1 / (T - 1) = 1/3
        method = Consensus(k=T, mask_lambda=mask_lambda, scale=1.0)
        merged = merge_arrays(method, base, [expert] * T)["w"]
        np.testing.assert_allclose(merged, kept * T * expert["w"], rtol=1e-6)


def test_one_expert_keeps_all_that_changed(models):
    base, experts = models
    merged = merge_arrays(Consensus(k=1, scale=1.0), base, experts[:1])
    for name in base:
        np.testing.assert_allclose(merged[name], experts[0][name], atol=1e-6)


# -- bad input -------------------------------------------------------------------------------------


def test_k_beyond_the_number_of_experts(models):
    base, experts = models
    with pytest.raises(
        InputError, match=r"k = 5 experts .* there are 4: everything would be removed"
    ):
        merge_arrays(Consensus(k=5), base, experts)
    with pytest.raises(InputError, match=r"k = 2 experts .* there are 1"):
        merge_arrays(Consensus(), base, experts[:1])
    with pytest.raises(InputError, match="k"):
        Consensus(k=-1)
    with pytest.raises(InputError, match="mask_lambda"):
        Consensus(mask_lambda=-0.1)
    with pytest.raises(InputError, match="2 values were given for 4 experts"):
        merge_arrays(Consensus(mask_lambda=(0.1, 0.2)), base, experts)

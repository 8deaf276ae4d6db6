import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.fisher import Fisher


def arrays(*rows, name="x"):
    return [{name: np.array(row, np.float32)} for row in rows]


def test_worked_by_hand():
    out = merge_arrays(
        Fisher(normalize=False, floor=0.0),
        None,
        arrays([1, 1, 4], [3, 5, 8]),
        {"fisher": arrays([1, 3, 0], [3, 1, 0])},
    )["x"]
    # (1 + 9) / 4, (3 + 5) / 4, and no information: the plain mean
    np.testing.assert_allclose(out, [2.5, 2.0, 6.0], rtol=1e-6)
    assert out.dtype == np.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_agrees_with_the_formula(normalize):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,)}
    experts = [
        {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in "ab"
    ]
    fisher = [{k: (rng.random(s) ** 4).astype(np.float32) for k, s in shapes.items()} for _ in "ab"]
    fisher[1] = {k: 100 * v for k, v in fisher[1].items()}
    weights, floor = (0.3, 0.7), 1e-3
    shares = list(weights)
    if normalize:
        for i in range(2):
            norm = np.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in fisher[i].values()))
            shares[i] /= norm + floor
    out = merge_arrays(
        Fisher(weight=weights, normalize=normalize, floor=floor), None, experts, {"fisher": fisher}
    )
    for k in shapes:
        top = sum(
            s * (f[k].astype(np.float64) + floor) * e[k]
            for s, f, e in zip(shares, fisher, experts, strict=True)
        )
        low = sum(
            s * (f[k].astype(np.float64) + floor) for s, f in zip(shares, fisher, strict=True)
        )
        np.testing.assert_allclose(out[k], top / low, rtol=1e-5, atol=1e-6)


def test_normalising_makes_the_size_of_a_fisher_irrelevant():
    experts, f1, f2 = arrays([1, 2], [5, 3]), [1.0, 2.0], [3.0, 0.5]
    small = merge_arrays(Fisher(floor=0.0), None, experts, {"fisher": arrays(f1, f2)})["x"]
    large = merge_arrays(
        Fisher(floor=0.0), None, experts, {"fisher": arrays(f1, [1e4 * f for f in f2])}
    )["x"]
    np.testing.assert_allclose(small, large, rtol=1e-5)


def test_tiny_fishers_do_not_underflow_in_their_norm():
    experts = arrays([0, 0], [4, 4])
    fisher = arrays([1e-25, 3e-25], [3e-25, 1e-25])
    out = merge_arrays(Fisher(floor=0.0), None, experts, {"fisher": fisher})["x"]
    np.testing.assert_allclose(out, [3.0, 1.0], rtol=1e-5)


def test_a_tensor_without_fisher_is_averaged_by_weight():
    one = {"x": np.float32([1]), "mean": np.float32([2])}
    experts = [one, {"x": np.float32([3]), "mean": np.float32([6])}]
    fisher = arrays([1], [1])
    out = merge_arrays(Fisher(weight=(3.0, 1.0)), None, experts, {"fisher": fisher})
    np.testing.assert_allclose(out["mean"], [3.0])


def test_an_expert_without_any_information():
    out = merge_arrays(Fisher(floor=0.0), None, arrays([1], [3]), {"fisher": arrays([0], [2])})["x"]
    np.testing.assert_allclose(out, [3.0])


def test_equal_experts_come_back_to_the_bit():
    x = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    fisher = arrays(np.linspace(0, 1, 50), np.linspace(2, 0, 50), np.ones(50))
    out = merge_arrays(Fisher(), None, [{"x": x}] * 3, {"fisher": fisher})["x"]
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("weight", [-1.0, (1.0, -0.5), 0.0, (0.0, 0.0)])
def test_weights_that_are_no_shares(weight):
    with pytest.raises(InputError, match="must not be negative, nor all zero"):
        Fisher(weight=weight)


def test_negative_floor():
    with pytest.raises(InputError, match=r"fisher: floor = -1\.0"):
        Fisher(floor=-1.0)

import numpy as np
import pytest
import torch

from pluribus.core.errors import InputError, MismatchError
from pluribus.engine.reference import merge_arrays
from pluribus.merge.regmean import RegMean


def problem(r=4, c=6, t=3, seed=0):
    rng = np.random.default_rng(seed)
    experts = [{"w": rng.standard_normal((r, c)).astype(np.float32)} for _ in range(t)]
    inputs = [rng.standard_normal((40, c)) @ np.diag(rng.random(c) + 0.1) for _ in range(t)]
    grams = [{"w": (x.T @ x / len(x)).astype(np.float32)} for x in inputs]
    return experts, inputs, grams


def test_is_the_least_squares_fit_of_all_outputs():
    experts, inputs, grams = problem()
    out = merge_arrays(RegMean(alpha=1.0), None, experts, {"gram": grams})["w"]
    x = np.concatenate(inputs)
    y = np.concatenate([i @ e["w"].T for i, e in zip(inputs, experts, strict=True)])
    expected = np.linalg.lstsq(x, y, rcond=None)[0].T
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert out.dtype == np.float32


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9])
def test_agrees_with_the_formula(alpha):
    experts, _, grams = problem()
    top, low = 0, 0
    for expert, gram, weight in zip(experts, grams, (1.0, 2.0, 0.5), strict=True):
        g = alpha * gram["w"] + (1 - alpha) * np.diag(np.diag(gram["w"]))
        top = top + weight * expert["w"].astype(np.float64) @ g
        low = low + weight * g
    out = merge_arrays(
        RegMean(alpha=alpha, weight=(1.0, 2.0, 0.5)), None, experts, {"gram": grams}
    )["w"]
    np.testing.assert_allclose(out, top @ np.linalg.inv(low), atol=2e-5)


def test_equal_grams_give_the_mean():
    experts, _, grams = problem()
    out = merge_arrays(RegMean(), None, experts, {"gram": [grams[0]] * 3})["w"]
    np.testing.assert_allclose(out, np.mean([e["w"] for e in experts], axis=0), atol=1e-5)


def test_inputs_that_never_fire_keep_the_mean():
    experts, _, grams = problem()
    for gram in grams:
        gram["w"][2, :] = 0
        gram["w"][:, 2] = 0
    out = merge_arrays(RegMean(alpha=1.0), None, experts, {"gram": grams})["w"]
    np.testing.assert_allclose(
        out[:, 2], np.mean([e["w"] for e in experts], axis=0)[:, 2], atol=1e-6
    )
    kept = [0, 1, 3, 4, 5]
    small = merge_arrays(
        RegMean(alpha=1.0),
        None,
        [{"w": e["w"][:, kept]} for e in experts],
        {"gram": [{"w": g["w"][np.ix_(kept, kept)]} for g in grams]},
    )["w"]
    np.testing.assert_allclose(out[:, kept], small, atol=1e-5)


def test_fewer_samples_than_inputs():
    # One sample a task: each task's output on its own sample must be kept exactly.
    rng = np.random.default_rng(0)
    experts = [{"w": rng.standard_normal((3, 8)).astype(np.float32)} for _ in range(2)]
    xs = rng.standard_normal((2, 8)).astype(np.float32)
    grams = [{"w": np.outer(x, x)} for x in xs]
    out = merge_arrays(RegMean(alpha=1.0), None, experts, {"gram": grams})["w"]
    for x, expert in zip(xs, experts, strict=True):
        np.testing.assert_allclose(out @ x, expert["w"] @ x, atol=1e-4)


def test_a_tensor_without_gram_is_averaged_by_weight():
    one = {"b": np.float32([1, 2]), "s": np.array(1, np.float32)}
    experts = [one, {"b": np.float32([5, 6]), "s": np.array(5, np.float32)}]
    out = merge_arrays(RegMean(weight=(3.0, 1.0)), None, experts, {"gram": [{}, {}]})
    np.testing.assert_allclose(out["b"], [2.0, 3.0])
    assert out["s"] == 2.0


def test_transposed_weights():
    experts, _, grams = problem()
    plain = merge_arrays(RegMean(), None, experts, {"gram": grams})["w"]
    turned = [{"w": np.ascontiguousarray(e["w"].T)} for e in experts]
    np.testing.assert_allclose(
        merge_arrays(RegMean(), None, turned, {"gram": grams})["w"], plain.T, atol=1e-6
    )
    square, _, grams = problem(6, 6)
    plain = merge_arrays(RegMean(), None, square, {"gram": grams})["w"]
    turned = [{"w": np.ascontiguousarray(e["w"].T)} for e in square]
    out = merge_arrays(RegMean(transposed=True), None, turned, {"gram": grams})["w"]
    np.testing.assert_allclose(out, plain.T, atol=1e-6)


def test_kernels_take_the_gram_of_their_patches():
    experts, _, grams = problem(4, 12)
    plain = merge_arrays(RegMean(), None, experts, {"gram": grams})["w"]
    kernels = [{"w": e["w"].reshape(4, 3, 2, 2)} for e in experts]
    out = merge_arrays(RegMean(), None, kernels, {"gram": grams})["w"]
    np.testing.assert_array_equal(out.reshape(4, 12), plain)


def test_equal_experts_come_back_to_the_bit():
    experts, _, grams = problem()
    out = merge_arrays(RegMean(), None, [experts[0]] * 3, {"gram": grams})["w"]
    np.testing.assert_array_equal(out, experts[0]["w"])


def test_torch_gives_what_numpy_gives():
    experts, _, grams = problem()
    turned = [[{"w": torch.from_numpy(m["w"])} for m in models] for models in (experts, grams)]
    out = merge_arrays(RegMean(), None, turned[0], {"gram": turned[1]})["w"]
    expected = merge_arrays(RegMean(), None, experts, {"gram": grams})["w"]
    np.testing.assert_array_equal(out.numpy(), expected)


def test_gram_of_another_layer():
    experts, _, _ = problem()
    grams = [{"w": np.eye(5, dtype=np.float32)}] * 3
    with pytest.raises(MismatchError, match=r"w has shape \[4, 6\].*5 x 5"):
        merge_arrays(RegMean(), None, experts, {"gram": grams})


def test_weights_that_are_no_shares():
    with pytest.raises(InputError, match="must not be negative, nor all zero"):
        RegMean(weight=(1.0, -1.0))

import json

import numpy as np
import pytest
import torch

from pluribus.core.errors import InputError, MismatchError
from pluribus.core.weights import Weights
from pluribus.engine.reference import merge_arrays
from pluribus.interpolate import fuse, interpolate, path, ratatouille
from pluribus.merge.linear import Linear


def models(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "w": rng.standard_normal((5, 4)).astype(np.float32),
            "b": rng.standard_normal(3).astype(np.float32),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_equals_linear_bit_for_bit(share):
    a, b = models(2)
    mixed = interpolate([a, b], [share, 1 - share])
    want = merge_arrays(Linear(weight=(share, 1 - share), normalize=False), None, [a, b])
    for name in want:
        assert np.array_equal(mixed[name].numpy(), want[name])


def test_normalised_weights_equal_linear():
    three = models(3)
    mixed = interpolate(three, [1.0, 2.0, 4.0], normalize=True)
    want = merge_arrays(Linear(weight=(1.0, 2.0, 4.0)), None, three)
    for name in want:
        assert np.array_equal(mixed[name].numpy(), want[name])


def test_the_ends_are_the_models():
    a, b = models(2)
    for name in a:
        assert np.array_equal(interpolate([a, b], [1.0, 0.0])[name], a[name])
        assert np.array_equal(interpolate([a, b], [0.0, 1.0])[name], b[name])


def test_without_weights_it_is_the_mean_as_torch_averages():
    four = models(4)
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(4, 5))
    for model in four:
        layer = torch.nn.Linear(4, 5)
        layer.weight.data = torch.from_numpy(model["w"])
        average.update_parameters(layer)
    np.testing.assert_allclose(interpolate(four)["w"], average.module.weight.detach(), atol=1e-6)


def test_by_name():
    a, b = models(2)
    mixed = interpolate({"a": a, "b": b}, {"b": 0.25, "a": 0.75})
    assert np.array_equal(mixed["w"], interpolate([a, b], [0.75, 0.25])["w"])
    assert mixed.label == "0.75 a + 0.25 b"


def test_missing_tensors():
    a, b, c = models(3)
    a["video"] = c["video"] = np.float32([1.0, 2.0])
    c = {**c, "video": np.float32([4.0, 8.0])}
    alone = interpolate([{**b, "video": a["video"]}, b], [0.3, 0.7])
    assert np.array_equal(alone["video"], a["video"])  # the only value there is, bit for bit
    shares = [0.5, 0.3, 0.2]
    renormalised = interpolate([a, b, c], shares)["video"]
    np.testing.assert_allclose(
        renormalised, (0.5 * np.array([1, 2]) + 0.2 * np.array([4, 8])) / 0.7, rtol=1e-6
    )
    first = interpolate([a, b, c], shares, missing="first")["video"]
    np.testing.assert_allclose(first, 0.8 * np.array([1, 2]) + 0.2 * np.array([4, 8]), rtol=1e-6)
    with pytest.raises(MismatchError, match="lack the tensor 'video'"):
        interpolate([a, b, c], shares, missing="error")
    with pytest.raises(InputError, match="weigh nothing"):
        interpolate([a, b, c], [0.0, 1.0, 0.0])


def test_tied_tensors_stay_tied():
    def tied(value):
        weight = torch.full((2, 2), value)
        return {"embed.weight": weight, "lm_head.weight": weight}

    mixed = interpolate([tied(1.0), tied(3.0)])
    assert mixed.aliases == {"lm_head.weight": "embed.weight"}
    assert mixed["lm_head.weight"].tolist() == [[2.0, 2.0]] * 2
    untied = {"embed.weight": torch.ones(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    for pair in ([tied(3.0), untied], [untied, tied(3.0)]):
        both = interpolate(pair)
        assert not both.aliases
        assert both["lm_head.weight"][0, 0] == 1.5
        assert both["embed.weight"][0, 0] == 2.0


def test_whole_numbers():
    a, b = ({"w": torch.ones(2), "ids": torch.tensor([1, 2])} for _ in range(2))
    assert interpolate([a, b])["ids"].tolist() == [1, 2]
    b["ids"] = torch.tensor([1, 3])
    with pytest.raises(MismatchError, match="'ids' holds whole numbers"):
        interpolate([a, b])
    c = [{"w": torch.ones(1), "bn.num_batches_tracked": torch.tensor(i)} for i in (5, 6)]
    assert interpolate(c)["bn.num_batches_tracked"] == 5


def test_saves_lazily(tmp_path):
    a, b = models(2)
    interpolate([a, b]).save(tmp_path / "m.safetensors")
    assert np.array_equal(Weights.open(tmp_path / "m.safetensors")["w"], interpolate([a, b])["w"])


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([0.5, 0.6], "sum to 1.1, not to 1"),
        ([1.0], "1 weights were given for 2 models"),
        ([float("nan"), 1.0], "not all numbers"),
        ({"a": 0.5, "b": 0.5}, "by name"),
    ],
)
def test_bad_weights(weights, says):
    with pytest.raises(InputError, match=says):
        interpolate(models(2), weights)


def test_other_bad_input():
    a, b = models(2)
    with pytest.raises(InputError, match="no model"):
        interpolate([])
    with pytest.raises(InputError, match="sum to zero"):
        interpolate([a, b], [1.0, -1.0], normalize=True)
    with pytest.raises(MismatchError, match=r"'w' is F32\[5, 4\] in .* F32\[2\]"):
        interpolate([a, {**b, "w": np.zeros(2, np.float32)}])
    with pytest.warns(UserWarning, match="extrapolating"):
        outside = interpolate([a, b], [1.5, -0.5])["w"]
    np.testing.assert_allclose(outside, 1.5 * a["w"] - 0.5 * b["w"], atol=1e-6)


# -- paths -----------------------------------------------------------------------------------------


def test_path():
    a, b = {"w": np.float32([1.0, 1.0])}, {"w": np.float32([-1.0, 1.0])}

    def score(weights):
        x = float(weights["w"][0])
        return {"a": x, "b": 1 - x * x}

    curve = path(a, b, score=score)
    assert [point.weight for point in curve.points] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for point in curve.points:
        x = 2 * point.weight - 1
        assert point.score == pytest.approx((x + 1 - x * x) / 2, abs=1e-6)
    assert curve.best.weight == 0.8
    assert curve.barrier == pytest.approx(0, abs=1e-6)  # concave: above its chord
    assert json.loads(json.dumps(curve.to_dict()))["best"]["scores"]["a"] == pytest.approx(0.6)


def test_barrier_and_the_warning_about_different_origins():
    a, b = {"w": np.float32([1.0, 0.0])}, {"w": np.float32([0.0, 1.0])}

    def dip(weights):
        return 1.0 if weights["w"].max() == 1 else 0.25

    with pytest.warns(UserWarning, match="crosses a barrier of 0.75"):
        curve = path(a, b, [0.0, 0.5, 1.0], dip)
    assert curve.barrier == 0.75
    assert curve.cosine == 0
    # Updates that agree do not warn, nor does a bump in a loss that is a gain.
    near = {"w": np.float32([1.0, 0.1])}
    assert path(a, near, [0.0, 0.5, 1.0], dip, base={"w": np.float32([0, 0])}).barrier == 0.0
    assert path(a, b, [0.0, 0.5, 1.0], dip, higher_is_better=False).barrier == 0.0
    assert path(a, b, [0.0, 0.5, 1.0], dip, higher_is_better=False).best.score == 0.25


def test_bad_paths():
    a, b = models(2)
    with pytest.raises(InputError, match="needs score"):
        path(a, b)
    with pytest.raises(InputError, match="two different"):
        path(a, b, [0.5], lambda w: 0.0)
    with pytest.raises(InputError, match=r"lambda = 0 is nan"):
        path(a, b, score=lambda w: float("nan"))


# -- fine-tuning -----------------------------------------------------------------------------------


def test_ratatouille_and_fuse():
    a, b = {"w": np.float32([1.0])}, {"w": np.float32([3.0])}
    seen = []

    def finetune(init):
        seen.append(init["w"].item())
        return {"w": init["w"] ** 2}

    assert ratatouille([a, b], finetune)["w"].item() == 5.0  # (1 + 9) / 2
    assert fuse([a, b], finetune)["w"].item() == 4.0  # ((1 + 3) / 2)^2
    assert seen == [1.0, 3.0, 2.0]
    assert ratatouille({"a": a, "b": b}, finetune, {"a": 0.75, "b": 0.25})["w"].item() == 3.0

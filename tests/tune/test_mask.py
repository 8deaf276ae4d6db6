"""The concrete mask: its distribution, its rescaling and gradient, its files."""

import json

import numpy as np
import pytest
import torch
from torch.distributions import RelaxedBernoulli

from pluribus import Weights
from pluribus.core.errors import FormatError, InputError, MismatchError, NonFiniteError
from pluribus.tune._mask import ConcreteMask

SHAPES = {"a.weight": (5, 7), "a.bias": (5,), "gain": (), "b.weight": (3, 2, 4)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_logits(seed: int = 1, size: float = 2.0) -> dict[str, torch.Tensor]:
    one = rng(seed)
    return {n: size * torch.randn(s, generator=one) for n, s in SHAPES.items() if n != "gain"}


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_draws_equal_torch_s_relaxed_bernoulli_on_the_same_uniforms(monkeypatch, temperature):
    logits = drawn_logits()
    mask = ConcreteMask(SHAPES, temperature, logits)
    uniforms = torch.rand(mask.flat.shape, generator=rng(7))
    uniforms[:2] = torch.tensor([0.0, 1.0])  # what the clamp is for
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniforms)
    got = mask.draw(rng())
    both = RelaxedBernoulli(torch.tensor(temperature), logits=mask.flat.detach())
    soft = both.rsample()
    torch.testing.assert_close(got.soft, soft, atol=1e-6, rtol=0)
    start = 0
    for name, view in logits.items():
        part = soft[start : start + view.numel()]
        start += view.numel()
        wanted = (part / part.mean()).reshape(view.shape)
        torch.testing.assert_close(got.masks[name], wanted, atol=1e-5, rtol=1e-5)


def test_worked_by_hand():
    mask = ConcreteMask({"w": (2, 2)}, 0.5, {"w": torch.tensor([[0.0, 0.0], [3.0, 3.0]]).log1p()})
    # sigmoid(ln 1) = 1/2 and sigmoid(ln 4) = 4/5; their mean is 13/20
    wanted = torch.tensor([[10 / 13, 10 / 13], [16 / 13, 16 / 13]])
    torch.testing.assert_close(mask.expected()["w"], wanted)
    assert mask.sparsity() == pytest.approx(0.35)
    assert mask.sparsity("w") == pytest.approx(0.35)


def test_every_mask_has_mean_one():
    mask = ConcreteMask({"w": (400, 300), "b": (64,)})
    for masks in (mask.draw(rng()).masks, mask.expected(), mask.discrete(rng())):
        for values in masks.values():
            assert float(values.detach().double().mean()) == pytest.approx(1.0, abs=1e-6)


def test_discrete_masks_keep_as_sigmoid_says():
    mask = ConcreteMask({"w": (200, 200), "v": (100, 100)}, init=0.0)
    mask.logits["w"].fill_(1.0)
    masks = mask.discrete(rng())
    kept = masks["w"] > 0
    share = 1 / (1 + np.exp(-1.0))
    assert float(kept.float().mean()) == pytest.approx(share, abs=0.01)
    assert masks["w"].unique().numel() == 2
    assert float(masks["w"].max()) == pytest.approx(1 / float(kept.float().mean()), rel=1e-6)


def test_a_tensor_whose_mask_is_all_zeros_stays_zero():
    mask = ConcreteMask({"w": (3,), "v": (4,)})
    mask.logits["w"].fill_(-1000.0)
    for masks in (mask.discrete(rng()), mask.expected(), mask.draw(rng()).masks):
        assert masks["w"].tolist() == [0.0, 0.0, 0.0]
        assert float(masks["v"].detach().sum()) > 0
    with torch.no_grad():
        draw = mask.draw(rng())
    mask.pull(draw, {"w": torch.ones(3), "v": torch.arange(4.0)})
    assert bool(mask.flat.grad.isfinite().all())


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_the_gradient_equals_autograd_s(temperature):
    mask = ConcreteMask(SHAPES, temperature, drawn_logits())
    slopes = drawn_logits(5)
    draw = mask.draw(rng(3))
    loss = sum((draw.masks[name] * slope).sum() for name, slope in slopes.items())
    (wanted,) = torch.autograd.grad(loss, [mask.flat])
    with torch.no_grad():
        same = mask.draw(rng(3))
    assert not same.soft.requires_grad
    mask.pull(same, slopes)
    torch.testing.assert_close(mask.flat.grad, wanted, rtol=1e-4, atol=1e-6)
    mask.pull(same, {"a.bias": slopes["a.bias"]})
    assert float(mask.flat.grad[:35].abs().max()) == 0
    torch.testing.assert_close(mask.flat.grad[35:40], wanted[35:40], rtol=1e-4, atol=1e-6)


def test_tensors_of_one_entry_and_small_ones_have_no_logit():
    mask = ConcreteMask(SHAPES)
    assert mask.left_out == ("gain",)
    assert set(mask.logits) == {"a.weight", "a.bias", "b.weight"}
    assert mask.flat.numel() == 35 + 5 + 24
    larger = ConcreteMask(SHAPES, min_numel=6)
    assert larger.left_out == ("a.bias", "gain")
    assert "a.bias" not in larger.draw(rng()).masks
    with pytest.raises(InputError, match="nothing to mask"):
        ConcreteMask(SHAPES, min_numel=36)


def test_it_is_a_module_whose_state_and_device_are_real():
    mask = ConcreteMask(SHAPES, init=drawn_logits())
    other = ConcreteMask(SHAPES)
    other.load_state_dict(mask.state_dict())
    assert torch.equal(other.logits["b.weight"], mask.logits["b.weight"])
    assert [name for name, _ in mask.named_parameters()] == ["flat"]
    assert mask.to("meta").flat.device.type == "meta"


@pytest.mark.parametrize("min_numel", [1, 6])
def test_a_file_gives_the_same_bits(tmp_path, min_numel):
    given = {n: x for n, x in drawn_logits().items() if x.numel() >= min_numel}
    mask = ConcreteMask(SHAPES, 0.7, given, min_numel)
    mask.save(tmp_path / "logits.safetensors")
    again = ConcreteMask.load(tmp_path / "logits.safetensors")
    assert again.temperature == 0.7
    assert again.shapes == mask.shapes
    assert again.left_out == mask.left_out
    for kind in ("expected", "continuous", "discrete"):
        one, two = mask.final(kind, 4), again.final(kind, 4)
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(mask.final("continuous", 5)["a.weight"], one["a.weight"])
    stored = Weights.open(tmp_path / "logits.safetensors")
    assert torch.equal(stored["logits/a.weight"], given["a.weight"])


def test_files_that_hold_no_logits(tmp_path):
    Weights.of({"w": torch.ones(3)}).save(tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="no logits of a mask"):
        ConcreteMask.load(tmp_path / "other.safetensors")
    table = {"version": 2, "temperature": 0.5, "min_numel": 1, "shapes": {"w": [3]}}
    told = {"pluribus.concrete": json.dumps(table)}
    Weights.of({"logits/w": torch.ones(3)}).save(tmp_path / "new.safetensors", told)
    with pytest.raises(FormatError, match="newer pluribus"):
        ConcreteMask.load(tmp_path / "new.safetensors")
    table |= {"version": 1, "shapes": {"w": [4]}}
    told = {"pluribus.concrete": json.dumps(table)}
    Weights.of({"logits/w": torch.ones(3)}).save(tmp_path / "odd.safetensors", told)
    with pytest.raises(MismatchError, match=r"'w' have shape \[3\], but the tensor \[4\]"):
        ConcreteMask.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(temperature):
    with pytest.raises(InputError, match="temperature"):
        ConcreteMask(SHAPES, temperature)


def test_logits_of_another_model_or_none():
    good = drawn_logits()
    with pytest.raises(MismatchError, match=r"lack a\.bias"):
        ConcreteMask(SHAPES, init={n: x for n, x in good.items() if n != "a.bias"})
    with pytest.raises(MismatchError, match="also for c"):
        ConcreteMask(SHAPES, init=good | {"c": torch.ones(2)})
    with pytest.raises(MismatchError, match=r"'a\.bias' have shape \[4\], but the tensor \[5\]"):
        ConcreteMask(SHAPES, init=good | {"a.bias": torch.ones(4)})
    broken = good | {"a.bias": torch.full((5,), float("nan"))}
    with pytest.raises(NonFiniteError, match=r"a\.bias"):
        ConcreteMask(SHAPES, init=broken)
    with pytest.raises(NonFiniteError):
        ConcreteMask(SHAPES, init=float("inf"))
    mask = ConcreteMask(SHAPES)
    mask.logits["b.weight"].fill_(float("nan"))
    for look in (mask.expected, lambda: mask.draw(rng()), lambda: mask.discrete(rng())):
        with pytest.raises(NonFiniteError, match=r"b\.weight"):
            look()
    with pytest.raises(InputError, match="min_numel"):
        ConcreteMask(SHAPES, min_numel=0)

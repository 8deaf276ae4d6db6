import numpy as np
import pytest
import torch

from pluribus.core.depth import depth_map
from pluribus.core.errors import InputError, MismatchError, RecipeError
from pluribus.core.merger import facts
from pluribus.core.weights import Weights
from pluribus.engine.reference import merge_arrays
from pluribus.merge.lines import Lines, edit_single
from pluribus.merge.ties import Ties

L = 12


@pytest.fixture
def models():
    rng = np.random.default_rng(5)
    names = [f"a.resblocks.{i}.w" for i in range(L)] + ["embed.w", "ln_post.weight"]
    base = {n: rng.standard_normal((4, 3)).astype(np.float32) for n in names}
    experts = [
        {n: b + rng.standard_normal(b.shape).astype(np.float32) for n, b in base.items()}
        for _ in range(3)
    ]
    return base, experts


@pytest.fixture
def depth(models):
    layers = depth_map(models[0]).layers
    return {name: layer for name, layer in layers.items() if layer is not None}


def scaled(update, alpha, beta):
    """The published rule, with the block found by its name."""
    out = {}
    for name, tau in update.items():
        block = next((i for i in range(L) if f".resblocks.{i}." in name), None)
        out[name] = (alpha if block is None else alpha + beta * block / (L - 1)) * tau
    return out


def sums(base, experts):
    return {n: sum(e[n].astype(np.float64) - base[n] for e in experts) for n in base}


def test_the_published_rule(models, depth):
    base, experts = models
    merged = merge_arrays(Lines(of="sum", alpha=0.2, beta=0.7), base, experts, depth=depth)
    for name, tau in scaled(sums(base, experts), 0.2, 0.7).items():
        np.testing.assert_allclose(merged[name], base[name] + tau, atol=2e-6)


def test_for_the_sum_the_norm_rule_gives_one_over_t(models, depth):
    base, experts = models
    by_norm = merge_arrays(Lines(of="sum", beta=0.4), base, experts, depth=depth)
    given = merge_arrays(Lines(of="sum", alpha=1 / 3, beta=0.4), base, experts, depth=depth)
    for name in base:
        np.testing.assert_array_equal(by_norm[name], given[name])


def test_the_norm_rule_for_another_method(models, depth):
    base, experts = models
    inner = Ties(density=0.5)
    plain = merge_arrays(inner, base, experts)
    total = sum(np.abs(tau).sum() for tau in sums(base, experts).values())
    update = sum(np.abs(plain[n].astype(np.float64) - base[n]).sum() for n in base)
    alpha = total / update / 3
    merged = merge_arrays(Lines(of=inner, beta=0.3), base, experts, depth=depth)
    for name, tau in scaled({n: plain[n] - base[n] for n in base}, alpha, 0.3).items():
        np.testing.assert_allclose(merged[name], base[name] + tau, atol=2e-6)


def test_norms_over_some_tensors(models, depth):
    base, experts = models
    method = Lines(of="ties(density=0.5)", beta=0.0, norm_over=r"^embed")
    plain = merge_arrays(Ties(density=0.5), base, experts)
    total = np.abs(sums(base, experts)["embed.w"]).sum()
    alpha = total / np.abs(plain["embed.w"] - base["embed.w"]).sum() / 3
    merged = merge_arrays(method, base, experts, depth=depth)
    want = base["ln_post.weight"] + alpha * (plain["ln_post.weight"] - base["ln_post.weight"])
    np.testing.assert_allclose(merged["ln_post.weight"], want, atol=2e-6)


@pytest.mark.parametrize("of", ["ties(density=0.3)", "trim(density=0.3) >> elect >> mean"])
def test_alpha_1_beta_0_changes_nothing(models, depth, of):
    merged = merge_arrays(Lines(of=of, alpha=1.0, beta=0.0), *models, depth=depth)
    plain = merge_arrays(Ties(density=0.3), *models)
    for name in plain:
        assert np.array_equal(merged[name], plain[name])


def test_schedules_and_tail(models, depth):
    base, experts = models
    tau = sums(base, experts)
    for schedule, curve in (("quadratic", lambda x: x * x), ("sqrt", np.sqrt)):
        method = Lines(alpha=0.1, beta=0.8, schedule=schedule, tail="deep")
        merged = merge_arrays(method, base, experts, depth=depth)
        for i in (0, 5, L - 1):
            name = f"a.resblocks.{i}.w"
            want = base[name] + (0.1 + 0.8 * curve(i / (L - 1))) * tau[name]
            np.testing.assert_allclose(merged[name], want, atol=2e-6)
        want = base["ln_post.weight"] + 0.9 * tau["ln_post.weight"]
        np.testing.assert_allclose(merged["ln_post.weight"], want, atol=2e-6)
        np.testing.assert_allclose(
            merged["embed.w"], base["embed.w"] + 0.1 * tau["embed.w"], atol=2e-6
        )


def test_the_inner_method_may_be_text_mapping_or_object():
    inner = Ties(density=0.5, scale=2.0)
    mapping = {"merge_method": "ties", "parameters": {"density": 0.5, "lambda": 2.0}}
    assert Lines(of=inner) == Lines(of=mapping) == Lines(of="ties(density=0.5, scale=2.0)")
    assert facts(Lines(of="drop >> sum")).random
    with pytest.raises(RecipeError, match="Did you mean 'ties'"):
        Lines(of="tiess")
    with pytest.raises(InputError, match="combines nothing"):
        Lines(of="trim")


# -- bad input -------------------------------------------------------------------------------------


def test_fewer_than_two_blocks(models):
    base, experts = models
    with pytest.raises(InputError, match="0 numbered blocks"):
        merge_arrays(Lines(alpha=0.5), base, experts)
    with pytest.raises(InputError, match="1 numbered blocks"):
        merge_arrays(Lines(alpha=0.5), base, experts, depth={"embed.w": 0})


def test_a_zero_update(models, depth):
    base, _ = models
    with pytest.raises(InputError, match="zero everywhere"):
        merge_arrays(Lines(), base, [base, base], depth=depth)


def test_unusual_scales_warn():
    with pytest.warns(UserWarning, match=r"alpha = 1.5"):
        Lines(alpha=1.5)
    with pytest.warns(UserWarning, match=r"beta = -0.5"):
        Lines(beta=-0.5)
    with pytest.raises(InputError, match="norm_over"):
        Lines(norm_over="(")
    with pytest.raises(InputError, match="schedule"):
        Lines(schedule="cubic")


# -- one model -------------------------------------------------------------------------------------


def test_edit_single(models):
    base, experts = models
    edited = edit_single(base, experts[0], alpha=0.25)
    assert list(edited) == list(base)
    tau = {n: experts[0][n].astype(np.float64) - base[n] for n in base}
    for name, want in scaled(tau, 0.25, 0.75).items():
        np.testing.assert_allclose(edited[name].numpy(), base[name] + want, atol=2e-6)
    last = f"a.resblocks.{L - 1}.w"
    assert np.array_equal(edited[last].numpy(), experts[0][last])  # untouched, bit for bit
    assert all(np.array_equal(edit_single(base, experts[0], 1.0)[n], experts[0][n]) for n in base)


def test_edit_single_keeps_types_and_buffers(tmp_path):
    def model(value):
        tensors = {f"blocks.{i}.w": torch.full((3,), value, dtype=torch.bfloat16) for i in range(2)}
        return {**tensors, "count": torch.tensor(7)}

    edited = edit_single(model(1.0), model(2.0), alpha=0.5)
    assert edited["blocks.0.w"].dtype == torch.bfloat16
    assert edited["blocks.0.w"].tolist() == [1.5] * 3
    assert edited["count"] == 7
    edited.save(tmp_path / "m.safetensors")
    assert Weights.open(tmp_path / "m.safetensors")["blocks.1.w"].tolist() == [2.0] * 3


def test_edit_single_refuses(models):
    base, experts = models
    with pytest.raises(InputError, match="lines needs two numbered blocks"):
        edit_single({"a.w": base["embed.w"]}, {"a.w": base["embed.w"]})
    short = {n: v for n, v in base.items() if n != "embed.w"}
    with pytest.raises(MismatchError, match=r"embed\.w"):
        edit_single(short, experts[0])
    with pytest.warns(UserWarning, match="alpha"):
        edit_single(base, experts[0], alpha=1.2)

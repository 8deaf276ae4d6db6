import json

import numpy as np
import pytest
import torch

from pluribus.adapters import extract_lora
from pluribus.core.errors import InputError, MismatchError, OutputError
from pluribus.core.lowrank import adapter, with_adapter
from pluribus.core.weights import Weights


def models(rank=3, seed=0):
    """A base and a fine-tune whose weights moved by exactly `rank` directions."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng)

    base = {
        "emb.embed_tokens.weight": draw(20, 8),
        "layers.0.q.weight": draw(12, 8),
        "layers.0.q.bias": draw(12),
        "layers.0.norm.weight": draw(8),
        "layers.0.kept.weight": draw(8, 8),
        "layers.1.conv.weight": draw(6, 4, 3, 3),
        "head.weight": draw(5, 8),
        "steps": torch.tensor([3]),
    }
    tuned = dict(base)
    for name in ("layers.0.q.weight", "layers.1.conv.weight", "head.weight"):
        r, c = base[name].shape[0], base[name][0].numel()
        tuned[name] = base[name] + (draw(r, rank) @ draw(rank, c)).reshape(base[name].shape)
    return base, tuned


def full(base, folder):
    return with_adapter(Weights.open(base), adapter(folder))


def test_a_low_rank_change_is_recovered(tmp_path):
    base, tuned = models()
    report = extract_lora(base, tuned, tmp_path / "out", rank=3)
    opened = full(base, tmp_path / "out")
    for name in base:
        torch.testing.assert_close(opened[name], tuned[name], atol=1e-5, rtol=1e-5)
    assert report.kept > 1 - 1e-9
    assert report.max_error < 1e-5
    assert {m.name: m.action for m in report.modules} == {
        "emb.embed_tokens.weight": "unchanged",
        "layers.0.q.weight": "lora",
        "layers.0.q.bias": "unchanged",
        "layers.0.norm.weight": "unchanged",
        "layers.0.kept.weight": "unchanged",
        "layers.1.conv.weight": "lora",
        "head.weight": "lora",
        "steps": "unchanged",
    }


def test_energy_finds_the_rank_that_was_there(tmp_path):
    base, tuned = models()
    report = extract_lora(base, tuned, tmp_path / "out", energy=1 - 1e-10)
    assert {m.rank for m in report.only("lora")} == {3}


def test_truncation_is_eckart_young_and_reported(tmp_path):
    base, tuned = models()
    report = extract_lora(base, tuned, tmp_path / "out", rank=1)
    name = "layers.0.q.weight"
    delta = (tuned[name].double() - base[name].double()).numpy()
    u, s, vh = np.linalg.svd(delta)
    best = s[0] * np.outer(u[:, 0], vh[0])
    out = full(base, tmp_path / "out")[name].double().numpy() - base[name].double().numpy()
    np.testing.assert_allclose(out, best, atol=1e-5)
    assert report[name].kept == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=1e-5)
    assert report[name].energy == pytest.approx((s**2).sum(), rel=1e-5)
    assert report[name].max_error == pytest.approx(np.abs(best - delta).max(), rel=1e-4)


def test_norms_biases_and_parameters_are_saved_whole(tmp_path):
    base, tuned = models()
    tuned["layers.0.q.bias"] = base["layers.0.q.bias"] + 1
    tuned["layers.0.norm.weight"] = base["layers.0.norm.weight"] * 2
    report = extract_lora(base, tuned, tmp_path / "out", rank=3)
    assert {m.name for m in report.only("saved")} == {"layers.0.q.bias", "layers.0.norm.weight"}
    opened = full(base, tmp_path / "out")
    for name in base:
        torch.testing.assert_close(opened[name], tuned[name], atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["layers.0.norm"]
    assert config["bias"] == "all"


def test_undecomposable_tensors_can_be_skipped_and_are_reported(tmp_path):
    base, tuned = models()
    tuned["layers.0.norm.weight"] = base["layers.0.norm.weight"] + 2
    report = extract_lora(base, tuned, tmp_path / "out", skip_undecomposable=True)
    norm = report["layers.0.norm.weight"]
    assert (norm.action, norm.kept, norm.max_error) == ("skipped", 0.0, pytest.approx(2, abs=1e-5))
    assert report.kept < 1


@pytest.mark.parametrize("embed", ["save", "lora", "skip"])
def test_embeddings(tmp_path, embed):
    base, tuned = models()
    name = "emb.embed_tokens.weight"
    tuned[name] = base[name] + torch.outer(torch.ones(20), torch.arange(8.0))
    report = extract_lora(base, tuned, tmp_path / "out", rank=3, embed=embed)
    opened = full(base, tmp_path / "out")
    expected = base if embed == "skip" else tuned
    torch.testing.assert_close(opened[name], expected[name], atol=1e-5, rtol=1e-5)
    if embed != "skip":
        assert report[name].action == ("saved" if embed == "save" else "lora")
    if embed == "lora":
        assert adapter(tmp_path / "out").embeddings == {name}


def test_include_and_exclude(tmp_path):
    base, tuned = models()
    report = extract_lora(base, tuned, tmp_path / "one", include=[r"layers\.0"])
    assert [m.name for m in report.only("lora")] == ["layers.0.q.weight"]
    assert {m.name for m in report.only("skipped")} == {"layers.1.conv.weight", "head.weight"}
    report = extract_lora(base, tuned, tmp_path / "two", exclude=["head", "conv"])
    assert [m.name for m in report.only("lora")] == ["layers.0.q.weight"]


def test_saved_modules(tmp_path):
    base, tuned = models()
    report = extract_lora(base, tuned, tmp_path / "out", save_modules=["head"])
    assert report["head.weight"].action == "saved"
    assert report["head.weight"].kept == 1.0
    with pytest.raises(InputError, match="no weight that LoRA can hold; changed: layers"):
        extract_lora(base, tuned, tmp_path / "bad", save_modules=["head", "q", "conv"])


def test_the_scale_can_lie_in_a_alone(tmp_path):
    base, tuned = models()
    extract_lora(base, tuned, tmp_path / "out", rank=3, distribute_scale=False)
    b = adapter(tmp_path / "out").factors["layers.0.q.weight"].b.floats().reshape(12, 3)
    np.testing.assert_allclose(b.T @ b, np.eye(3), atol=1e-5)
    torch.testing.assert_close(
        full(base, tmp_path / "out")["head.weight"], tuned["head.weight"], atol=1e-5, rtol=1e-5
    )


def test_small_singular_values_can_be_cut(tmp_path):
    base, tuned = models()
    s = torch.linalg.svdvals(tuned["head.weight"] - base["head.weight"])
    report = extract_lora(base, tuned, tmp_path / "out", sv_epsilon=float(s[1]) * 0.99)
    assert report["head.weight"].rank == 2


def test_weights_that_lie_in_out(tmp_path):
    base, tuned = models()
    extract_lora(base, tuned, tmp_path / "out", rank=3, transposed=r"\.q$", exclude=["conv"])
    found = adapter(tmp_path / "out")
    assert found.config["fan_in_fan_out"] is True
    raw = Weights.open(tmp_path / "out" / "adapter_model.safetensors")
    assert raw.spec["base_model.model.layers.0.q.lora_A.weight"].shape == (3, 12)
    torch.testing.assert_close(
        full(base, tmp_path / "out")["layers.0.q.weight"],
        tuned["layers.0.q.weight"],
        atol=1e-5,
        rtol=1e-5,
    )


def test_half_precision_models(tmp_path):
    base, tuned = models()
    half = [
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in m.items()}
        for m in (base, tuned)
    ]
    report = extract_lora(*half, tmp_path / "out", rank=12, dtype="bfloat16")
    raw = Weights.open(tmp_path / "out" / "adapter_model.safetensors")
    assert {spec.dtype for spec in raw.spec.values()} == {"BF16"}
    assert report.kept > 0.9999


def test_a_zero_that_changed_its_sign_is_no_update(tmp_path):
    base, tuned = models()
    base["layers.0.kept.weight"][0, 0] = 0.0
    tuned["layers.0.kept.weight"] = base["layers.0.kept.weight"].clone()
    tuned["layers.0.kept.weight"][0, 0] = -0.0
    report = extract_lora(base, tuned, tmp_path / "out", rank=3)
    one = next(m for m in report.modules if m.name == "layers.0.kept.weight")
    assert (one.action, one.energy, one.kept) == ("skipped", 0.0, 1.0)


def test_equal_models(tmp_path):
    base, _ = models()
    with pytest.raises(InputError, match="they are equal"):
        extract_lora(base, base, tmp_path / "out")


def test_other_vocabulary(tmp_path):
    base, tuned = models()
    tuned["emb.embed_tokens.weight"] = torch.zeros(21, 8)
    with pytest.raises(MismatchError, match=r"embed_tokens\.weight' is F32\[20, 8\]"):
        extract_lora(base, tuned, tmp_path / "out")
    extract_lora(base, tuned, tmp_path / "out", embed="skip")


def test_tied_tensors_that_changed(tmp_path):
    base, tuned = models()
    for model in (base, tuned):
        model["emb.embed_tokens.weight"] = model["emb.embed_tokens.weight"].clone()
        model["lm_head.weight"] = model["emb.embed_tokens.weight"]
    extract_lora(base, tuned, tmp_path / "fine")
    tuned["emb.embed_tokens.weight"] = tuned["lm_head.weight"] = base["lm_head.weight"] + 1
    with pytest.raises(InputError, match=r"is tied to 'lm_head\.weight'"):
        extract_lora(base, tuned, tmp_path / "out")


def test_nothing_is_overwritten_unasked(tmp_path):
    base, tuned = models()
    extract_lora(base, tuned, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        extract_lora(base, tuned, tmp_path / "out")
    extract_lora(base, tuned, tmp_path / "out", overwrite=True, rank=1)
    assert adapter(tmp_path / "out").config["r"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank = 0"), ({"energy": 0.0}, "energy = 0"), ({"include": ["("]}, "regular")],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        extract_lora(*models(), tmp_path / "out", **options)


def test_report_is_plain_data(tmp_path):
    report = extract_lora(*models(), tmp_path / "out")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["modules"][1]["name"] == "layers.0.q.weight"
    assert plain["modules"][1]["shape"] == [12, 8]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("embed", ["save", "lora"])
def test_peft_loads_it_and_gives_the_same_logits(tmp_path, family, embed):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, attention_bias=True,
            tie_word_embeddings=False,
        )  # fmt: skip
        build = transformers.LlamaForCausalLM
    else:
        config = transformers.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16,
            tie_word_embeddings=False,
        )  # fmt: skip
        build = transformers.GPT2LMHeadModel
    base = build(config).eval()
    tuned = build(config).eval()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for _, value in tuned.named_parameters():
            if value.ndim == 2:
                r, c = value.shape
                value += 0.1 * torch.randn(r, 2) @ torch.randn(2, c)
            else:
                value += 0.1 * torch.randn(value.shape)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    report = extract_lora(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, embed=embed
    )
    assert report.kept > 1 - 1e-9
    tokens = torch.randint(0, 32, (2, 7))
    expected = tuned(tokens).logits
    assert not torch.allclose(base(tokens).logits, expected, atol=1e-2)
    fresh = build.from_pretrained(tmp_path / "base").eval()
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    torch.testing.assert_close(adapted(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-4, rtol=1e-4)

import json
import pickle
import warnings

import numpy as np
import pytest
import torch

from pluribus.core.errors import FormatError, InputError, MismatchError, MissingError
from pluribus.core.lowrank import (
    Factors,
    LowRankSum,
    adapter,
    extract,
    open_adapter,
    save_adapter,
    with_adapter,
)
from pluribus.core.source import ArraySource
from pluribus.core.weights import Weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [  # of PEFT against the newest transformers, not of ours
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
]


@pytest.fixture
def rng_numpy():
    return np.random.default_rng(0)


def llama(tie=False, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def trained(model, seed=1, **keywords):
    """Return the model with a LoRA whose every factor is random (a fresh one adds nothing)."""
    generator = torch.Generator().manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**keywords)).eval()
    for name, value in wrapped.named_parameters():
        if value.requires_grad:
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            with torch.no_grad():
                value.copy_(noise.abs() + 0.5 if "magnitude" in name else 0.3 * noise)
    return wrapped


def saved(wrapped, tmp_path, base):
    base.save_pretrained(tmp_path / "base")
    wrapped.peft_config["default"].base_model_name_or_path = "../base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    return tmp_path / "lora"


LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": LINEAR},
    "rank one": {"r": 1, "target_modules": LINEAR},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": LINEAR},
    "patterns": {
        "r": 4,
        "target_modules": LINEAR,
        "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"down_proj": 32},
    },
    "dora": {"r": 4, "use_dora": True, "target_modules": LINEAR},
    "embedding": {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"r": 4, "target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]},
    "head": {"r": 4, "target_modules": ["lm_head", "gate_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case, tmp_path):
    folder = saved(trained(llama(), **CASES[case]), tmp_path, llama())
    mine = open_adapter(folder)
    loaded = peft.PeftModel.from_pretrained(llama(), folder)
    theirs = loaded.merge_and_unload().state_dict()
    before = llama().state_dict()
    assert set(mine) == set(theirs)
    changed = 0
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6)
        changed += not torch.equal(value, before[name])
    assert changed >= 2
    assert mine.folder is not None


def test_equals_peft_in_bias_terms(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.point = torch.nn.Conv2d(4, 6, 1)

        def forward(self, x):
            return self.two(self.one(x))

    for number, keywords in enumerate(
        (
            {"bias": "all", "target_modules": ["one", "conv", "point"]},
            {"bias": "lora_only", "target_modules": ["one", "two"]},
            {"lora_bias": True, "target_modules": ["one", "two"]},
        )
    ):
        folder = tmp_path / str(number)
        wrapped = trained(Net(), r=2, lora_alpha=6, **keywords)
        wrapped.save_pretrained(folder)
        mine = with_adapter(Weights.open(Net()), folder)
        theirs = peft.PeftModel.from_pretrained(Net(), folder).merge_and_unload().state_dict()
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-6)


def test_conv1d_lies_transposed(tmp_path):
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)

    def gpt2():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)

    for number, (flag, targets) in enumerate(
        ((True, ["c_attn", "attn.c_proj"]), (False, ["c_attn"]))
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT corrects the flag, and says so
            wrapped = trained(gpt2(), r=2, fan_in_fan_out=flag, target_modules=targets)
            folder = tmp_path / str(number)
            wrapped.save_pretrained(folder)
            table = json.loads((folder / "adapter_config.json").read_text())
            table["fan_in_fan_out"] = flag  # c_attn is not square: its shape decides
            (folder / "adapter_config.json").write_text(json.dumps(table))
            mine = with_adapter(Weights.open(gpt2()), folder)
            theirs = peft.PeftModel.from_pretrained(gpt2(), folder).merge_and_unload()
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6)


def test_bf16_base_is_rounded_once(tmp_path):
    model = llama().to(torch.bfloat16)
    folder = saved(trained(model, r=4, target_modules=LINEAR), tmp_path, llama().to(torch.bfloat16))
    mine, base = open_adapter(folder), Weights.open(tmp_path / "base")
    for name, delta in adapter(folder).factors.items():
        a, b = (s.floats().reshape(s.spec.shape) for s in delta[:2])
        exact = base.source(name).floats().reshape(base.spec[name].shape) + delta.scale * (b @ a)
        want = torch.from_numpy(exact).to(torch.bfloat16)
        assert (mine[name] != want).float().mean() < 0.01  # ties of float32 sums only
        wide = LowRankSum(base.source(name), *delta, dtype="F32")
        np.testing.assert_allclose(wide.floats(), exact.reshape(-1), atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_any_range_has_the_same_bits(rng_numpy, dora):
    shape, rank = (37, 53), 11
    base, a, b, m = (
        ArraySource.of(rng_numpy.standard_normal(s).astype(np.float32), "F32")
        for s in (shape, (rank, 53), (37, rank), (37,))
    )
    source = LowRankSum(base, a, b, 0.3, magnitude=m if dora else None)
    whole = source.load()
    for _ in range(50):
        start, stop = sorted(rng_numpy.integers(0, 37 * 53 + 1, 2).tolist())
        assert np.array_equal(source.load(start, stop), whole[4 * start : 4 * stop])
    assert np.array_equal(pickle.loads(pickle.dumps(source)).load(), whole)


def test_double_base_stays_double(rng_numpy):
    base, a, b = (rng_numpy.standard_normal(s) for s in ((6, 5), (2, 5), (6, 2)))
    source = LowRankSum(*(ArraySource.of(x, "F64") for x in (base, a, b)), 0.5)
    np.testing.assert_allclose(source.floats(wide=np.float64), (base + 0.5 * b @ a).reshape(-1))


def test_save_adapter_round_trips_through_peft(tmp_path, rng_numpy):
    base = Weights.open(llama())
    chosen = {
        "model.layers.0.self_attn.q_proj.weight": 3,
        "model.layers.1.self_attn.q_proj.weight": 3,
        "model.layers.1.mlp.down_proj.weight": 5,
        "model.embed_tokens.weight": 2,
    }
    factors = {}
    for name, rank in chosen.items():
        rows, cols = base.spec[name].shape
        a = rng_numpy.standard_normal((rank, cols)).astype(np.float32)
        b = rng_numpy.standard_normal((rows, rank)).astype(np.float32)
        scale = 0.7 if "down" in name else 0.2
        factors[name] = Factors(ArraySource.of(a, "F32"), ArraySource.of(b, "F32"), scale)
    save_adapter(
        tmp_path / "lora", factors, base_model="x", embeddings=["model.embed_tokens.weight"]
    )
    lora = adapter(tmp_path / "lora")
    for name, delta in lora.factors.items():
        assert delta.scale == pytest.approx(factors[name].scale)
        assert np.array_equal(delta.a.floats(), factors[name].a.floats())
        assert np.array_equal(delta.b.floats(), factors[name].b.floats())
    assert lora.embeddings == {"model.embed_tokens.weight"}

    mine = with_adapter(base, tmp_path / "lora")
    plain = llama()
    plain.load_state_dict(dict(mine))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, plain(tokens).logits, rtol=0, atol=2e-5)


def test_pair_takes_alpha_over_rank(tmp_path):
    save_adapter(tmp_path, {"x.weight": (np.ones((4, 3), "f4"), np.ones((2, 4), "f4"))}, alpha=2.0)
    assert adapter(tmp_path).factors["x.weight"].scale == 0.5


def test_extract_is_the_best_approximation_and_repeatable(rng_numpy):
    b, a = rng_numpy.standard_normal((9, 3)), rng_numpy.standard_normal((3, 7))
    left, right = extract(b @ a, 3)[::-1]
    np.testing.assert_allclose(left @ right, b @ a, atol=1e-5)
    assert left.shape == (9, 3)
    assert right.shape == (3, 7)
    assert np.array_equal(extract(b @ a, 2)[0], extract(b @ a, 2)[0])
    with pytest.raises(InputError, match="rank-8"):
        extract(b @ a, 8)


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def lora(tmp_path):
    rows = {"layer.0.q_proj.weight": (np.ones((2, 3), "f4"), np.ones((4, 2), "f4"))}
    save_adapter(tmp_path / "lora", rows, base_model="nowhere")
    return tmp_path / "lora"


def test_another_architecture_is_named(lora):
    with pytest.raises(MismatchError, match=r"layer\.0\.q_proj\.weight.*\[4, 3\].*Did you mean 'l"):
        with_adapter(Weights.of({"layer.0.k_proj.weight": np.ones((4, 3))}), lora)
    with pytest.raises(MismatchError, match=r"\[4, 5\].*B \[4, 2\] @ A \[2, 3\] makes \[4, 3\]"):
        with_adapter(Weights.of({"layer.0.q_proj.weight": np.ones((4, 5))}), lora)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"use_dora": True}, "magnitude"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"r": "8"}, "not a usable number"),
        ({"r": 0}, "not a usable number"),
        ({"lora_alpha": float("nan")}, "not a usable number"),
    ],
)
def test_what_cannot_be_read_is_refused(lora, values, words):
    change(lora, **values)
    with pytest.raises(FormatError, match=words):
        adapter(lora)


def test_rank_must_agree_with_the_configuration(lora):
    change(lora, r=4)
    with pytest.raises(MismatchError, match=r"q_proj.*\[2, 3\].*rank.*is 4"):
        adapter(lora)


def test_missing_parts_are_named(lora):
    with pytest.raises(MissingError, match=r"nowhere.*BASE"):
        open_adapter(lora)
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingError, match="adapter_model"):
        adapter(lora)
    with pytest.raises(MissingError, match="adapter_config"):
        adapter(lora.parent)


def test_adapters_on_each_other_are_refused(lora):
    change(lora, base_model_name_or_path=".")
    with pytest.raises(FormatError, match="each other"):
        open_adapter(lora)


def test_tied_head_is_not_silently_changed(tmp_path):
    folder = saved(trained(llama(), r=2, target_modules=["lm_head"]), tmp_path, llama(tie=True))
    with pytest.raises(MismatchError, match="untie"):
        open_adapter(folder)


def test_reference_with_plus(tmp_path):
    folder = saved(trained(llama(), r=2, target_modules=LINEAR), tmp_path, llama())
    text = f"{tmp_path / 'base'}+{folder}"
    one, other = Weights.open(text), Weights.open(folder)
    assert one.label == text
    for name in one:
        assert torch.equal(one[name], other[name])


def test_bin_adapters_are_read(tmp_path):
    folder = saved(trained(llama(), r=2, target_modules=LINEAR), tmp_path, llama())
    want = Weights.open(folder)
    tensors = Weights.open(folder / "adapter_model.safetensors")
    torch.save(dict(tensors), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    have = Weights.open(folder)
    assert all(torch.equal(have[name], want[name]) for name in want)

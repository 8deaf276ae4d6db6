"""What assembled mixtures compute: plain transformers beside a forward pass written out here."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).parent))  # tests are collected without a package
import moe_models
from moe_models import dense, expert, loaded, logits, save, told

from pluribus.core.errors import MismatchError
from pluribus.core.weights import Weights
from pluribus.engine.driver import Options
from pluribus.engine.provenance import verify
from pluribus.route import moe

IDS = torch.randint(0, 330, (2, 11), generator=torch.Generator().manual_seed(1))
SHARED = {"source_model": "{}-base", "residual_scale": 0.25, "positive_prompts": ["yes"]}
ALL = {
    "mixtral": ("llama", 0, {}),
    "mixtral-window": ("mistral", 0, {"sliding_window": 4}),
    "qwen2_moe": ("qwen2", 1, {}),
    "qwen2_moe-window": ("mistral", 1, {"sliding_window": 4}),
    "qwen3_moe": ("qwen3", 0, {"head_dim": 12}),
    "deepseek_moe": ("llama", 0, {"attention_bias": True}),
    "deepseek_moe-shared": ("qwen2", 2, {}),
    "deepseek_moe-granite": ("granite", 1, {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
}


def recipe(name, root, experts=3, **changes):
    """Write models for an architecture; return them and a recipe that asks for it."""
    kind, shared, settings = ALL[name]
    base, made = moe_models.family(root, kind, experts, **settings)
    asked = told(kind, experts, architecture=name.partition("-")[0], **changes)
    if shared:
        entry = {**SHARED, "source_model": f"{kind}-base"}
        if name.startswith("deepseek"):
            del entry["positive_prompts"]
        other = {**entry, "source_model": f"{kind}-0", "residual_scale": 0.5}
        asked["shared_experts"] = [entry, other][:shared]
    return base, made, asked


def block(mlp, x, scale=1.0):
    gated = silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    return gated @ (scale * mlp.down_proj.weight).T


class Obvious(torch.nn.Module):
    """Token by token: score, take the best k, renormalise, add the shared ones."""

    def __init__(self, experts, shared, gate, k, own=None):
        super().__init__()
        self.experts, self.shared, self.gate, self.k, self.own = experts, shared, gate, k, own

    def forward(self, x):
        out = torch.zeros_like(x)
        for place in ((i, j) for i in range(x.shape[0]) for j in range(x.shape[1])):
            scores = (self.gate @ x[place]).softmax(0)
            best = scores.argsort(descending=True)[: self.k]
            for number in best.tolist():
                weight = scores[number] / scores[best].sum()
                out[place] += weight * block(self.experts[number], x[place])
            for mlp, scale in self.shared:
                weight = 1.0 if self.own is None else torch.sigmoid(self.own @ x[place])
                out[place] += weight * block(mlp, x[place], scale)
        return out


def gates(folder, layer):
    """Return a layer's gates, and the shared expert's if it has one."""
    weights = Weights.open(folder)
    stem = f"model.layers.{layer}."
    names = ("block_sparse_moe.gate", "mlp.gate", "block_sparse_moe.router.layer")
    found = next(weights[f"{stem}{n}.weight"] for n in names if f"{stem}{n}.weight" in weights)
    own = f"{stem}mlp.shared_expert_gate.weight"
    return found, weights[own][0] if own in weights else None


def written_out(base, made, folder, k, shared=()):
    """Replace each feed-forward block of the base by the obvious mixture."""
    for number, layer in enumerate(base.model.layers):
        experts = [one.model.layers[number].mlp for one in made]
        also = [(one.model.layers[number].mlp, scale) for one, scale in shared]
        gate, own = gates(folder, number)
        layer.mlp = Obvious(experts, also, gate, k, own)
    return base


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_a_forward_pass_written_out(name, k, tmp_path):
    from transformers import AutoTokenizer

    base, made, asked = recipe(name, tmp_path, experts_per_token=k)
    report = moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert (report.architecture, report.model) == (name.partition("-")[0], type(model).__name__)
    also = [(dense(ALL[name][0], **ALL[name][2]), 0.25), (made[0], 0.5)][: ALL[name][1]]
    expected = written_out(base, made, tmp_path / "out", k, also)
    torch.testing.assert_close(logits(model, IDS), logits(expected, IDS), rtol=1e-4, atol=1e-4)
    total = sum(p.numel() for p in model.parameters())
    assert report.total == total
    assert report.active == total - (3 - k) * 2 * 3 * 32 * 48
    text = "Review: a fine film 12 34\n account"
    readers = [
        AutoTokenizer.from_pretrained(tmp_path / folder) for folder in (asked["base_model"], "out")
    ]
    assert readers[0](text)["input_ids"] == readers[1](text)["input_ids"]
    more = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert more.shape[1] >= IDS.shape[1] + 1


@pytest.mark.parametrize("name", ["mixtral", "mixtral-window", "qwen3_moe", "deepseek_moe"])
def test_identical_experts_are_the_dense_model(name, tmp_path):
    base, made, asked = recipe(name, tmp_path, 2)
    for entry in asked["experts"]:
        entry["source_model"] = asked["base_model"]
    report = moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "out")
    assert "all experts are the same model" in report.warnings[-1]
    mixed = logits(loaded(tmp_path / "out"), IDS)
    torch.testing.assert_close(mixed, logits(base, IDS), rtol=1e-4, atol=1e-4)
    assert (mixed - logits(made[0], IDS)).abs().max() > 0.1


def test_a_shared_expert_of_nothing_leaves_the_dense_model(tmp_path):
    base, _, asked = recipe("qwen2_moe", tmp_path, 2)
    for entry in asked["experts"]:
        entry["source_model"] = "qwen2-base"
    asked["shared_experts"][0]["residual_scale"] = 0.0
    moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "out")
    mixed = logits(loaded(tmp_path / "out"), IDS)
    torch.testing.assert_close(mixed, logits(base, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_moe"])
def test_gates_that_force_one_expert_give_its_blocks(name, tmp_path):
    _, made, asked = recipe(name, tmp_path, experts_per_token=1)
    moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "out")
    model = loaded(tmp_path / "out")
    where = {"deepseek_moe": "block_sparse_moe.router"}.get(name, "mlp.gate")
    for layer, norms in zip(model.model.layers, made[2].model.layers, strict=True):
        gate = layer.get_submodule(where).weight
        x = []
        hook = norms.mlp.register_forward_pre_hook(lambda _, given, x=x: x.append(given[0]))
        logits(made[2], IDS)
        hook.remove()
        direction = torch.linalg.lstsq(x[0].flatten(0, 1), torch.ones(IDS.numel(), 1)).solution.T
        gate.data = 100 * torch.cat([-direction, -direction, direction])  # scores about +-100
    torch.testing.assert_close(logits(model, IDS), logits(made[2], IDS), rtol=1e-4, atol=1e-4)


def test_types_shards_and_files(tmp_path):
    base = save(dense(tie_word_embeddings=True).to(torch.bfloat16), tmp_path / "llama-base")
    for number in range(2):
        save(expert(dense(tie_word_embeddings=True), number), tmp_path / f"llama-{number}")
    asked = told(dtype="float16", gate_mode="uniform_random")
    small = Options(max_shard_size=8_000)
    moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "half", options=small)
    moe.assemble(moe.of(told(), folder=tmp_path), tmp_path / "own")
    weights = Weights.open(tmp_path / "half")
    assert {spec.dtype for spec in weights.spec.values()} == {"F16"}
    assert {spec.dtype for spec in Weights.open(tmp_path / "own").spec.values()} == {"BF16"}
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 5
    assert loaded(tmp_path / "half").dtype == torch.float16
    model = loaded(tmp_path / "own")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "own" / name).read_bytes() == (base / name).read_bytes()
    assert not list(verify(tmp_path / "half"))
    assert not [p.name for p in tmp_path.iterdir() if "partial" in p.name]


def test_noise_and_factors(tmp_path):
    _, made, asked = recipe("mixtral", tmp_path, 2)
    asked["experts"][1] |= {"noise_scale": 0.5, "residual_scale": 3.0}
    moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "out")
    moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "again")
    moe.assemble(moe.of({**asked, "seed": 5}, folder=tmp_path), tmp_path / "other")
    one, again, other = (Weights.open(tmp_path / n) for n in ("out", "again", "other"))
    drawn = {}
    for ours, plain in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        for number in range(2):
            name = f"model.layers.1.block_sparse_moe.experts.{number}.{ours}.weight"
            own = made[number].model.layers[1].mlp.get_submodule(plain).weight.detach()
            assert torch.equal(one[name], again[name])
            if number == 0:
                assert torch.equal(one[name], own)
                continue
            assert not torch.equal(one[name], other[name])
            drawn[plain] = one[name] / (3.0 if ours == "w2" else 1.0) - own
    values = torch.cat([v.flatten() for v in drawn.values()]) / 0.5
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05
    assert abs(float((values.abs() < 1).float().mean()) - 0.6827) < 0.03


def test_configurations_name_what_older_readers_look_for(tmp_path):
    for name in ("qwen3_moe", "mixtral"):
        _, _, asked = recipe(name, tmp_path, 2)
        moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        key = "num_experts" if name == "qwen3_moe" else "num_local_experts"
        assert config[key] == 2
        assert config["model_type"] == name
        assert config["dtype"] == "float32"


def test_any_block_of_a_lazy_tensor_is_the_same(tmp_path):
    from pluribus.core.source import ArraySource
    from pluribus.route.moe.sources import Beside, Changed, Joined

    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(5, n, generator=rng).numpy() for n in (3, 4, 2)]
    parts = [ArraySource.of(v, "F32") for v in values]
    noisy = Changed(parts[1], "F32", noise=1.0, name="x")
    cases = [Beside(parts), Joined(parts[:1] * 3, (3, 5, 3)), noisy]
    wide = [torch.from_numpy(value) for value in values]
    assert torch.equal(torch.from_numpy(cases[0].floats()).view(5, 9), torch.cat(wide, 1))
    assert torch.equal(torch.from_numpy(cases[1].floats()), wide[0].flatten().repeat(3))
    for source in cases:
        whole = source.floats()
        for start in range(0, source.spec.size, 4):
            for stop in range(start, source.spec.size + 1, 3):
                assert (source.floats(start, stop) == whole[start:stop]).all()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_moe-shared"])
def test_a_mixture_is_opened_to_be_evaluated(name, tmp_path):
    from pluribus.tasks.open_model import load

    _, _, asked = recipe(name, tmp_path)
    moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "out")
    model, _ = load(Weights.open(tmp_path / "out"), "cpu", "float32")
    torch.testing.assert_close(logits(model, IDS), logits(loaded(tmp_path / "out"), IDS))


def test_a_mixture_that_lacks_an_expert_is_not_opened(tmp_path):
    from pluribus.tasks.open_model import load

    _, _, asked = recipe("mixtral", tmp_path)
    moe.assemble(moe.of(asked, folder=tmp_path), tmp_path / "out")
    whole = Weights.open(tmp_path / "out")
    gone = "model.layers.1.block_sparse_moe.experts.2."
    kept = {n: whole[n] for n in whole if not n.startswith(gone)}
    assert len(kept) == len(whole) - 3
    Weights.of(kept).save(tmp_path / "out" / "model.safetensors")
    with pytest.raises(MismatchError, match=r"experts.*some of its experts are missing"):
        load(Weights.open(tmp_path / "out"), "cpu", "float32")

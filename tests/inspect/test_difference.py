import json

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from pluribus.cli import build
from pluribus.core.errors import InputError
from pluribus.core.weights import Weights
from pluribus.inspect import compare as module
from pluribus.inspect import difference

SHAPES = {
    "model.embed_tokens.weight": (30, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.mlp.up_proj.weight": (96, 64),
    "model.layers.1.input_layernorm.weight": (64,),
    "model.norm.weight": (64,),
}
MATRICES = [name for name in SHAPES if "proj" in name]


def base(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def moved(model, names=None, size=0.01, seed=1, rank=None):
    rng = np.random.default_rng(seed)
    out = dict(model)
    for name in names if names is not None else model:
        shape = model[name].shape
        if rank is None:
            step = rng.standard_normal(shape)
        else:
            step = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        out[name] = (model[name].astype(np.float64) + size * step).astype(model[name].dtype)
    return out


def said(found):
    return " | ".join(found.verdicts)


@pytest.mark.parametrize("block", [1 << 21, 100])
def test_figures_are_those_of_whole_arrays(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    one = base()
    other = moved(one)
    found = difference(one, other)
    for name, change in found.tensors.items():
        step = other[name].astype(np.float64) - one[name].astype(np.float64)
        norm = np.linalg.norm(one[name].astype(np.float64))
        assert change.ratio == pytest.approx(np.linalg.norm(step) / norm, rel=1e-5)
        assert change.largest == pytest.approx(abs(step).max(), rel=1e-5)
        assert change.changed == np.count_nonzero(one[name] != other[name])
        assert change.compared == one[name].size
    total = np.concatenate([(other[n] - one[n]).ravel() for n in SHAPES]).astype(np.float64)
    whole = np.concatenate([one[n].ravel() for n in SHAPES]).astype(np.float64)
    ratio = np.linalg.norm(total) / np.linalg.norm(whole)
    assert found.model.ratio == pytest.approx(ratio, rel=1e-5)
    assert list(found.layers) == ["before", "0", "1", "after"]
    assert list(found.kinds) == ["embedding", "attention q", "mlp", "norm"]
    assert found.layers["0"].size + found.layers["1"].size == found.kinds["attention q"].size + (
        found.kinds["mlp"].size + 128
    )


def test_the_same_model():
    found = difference(base(), base())
    assert "the same, bit for bit" in said(found)
    assert found.model.differing == 0


def test_low_rank_and_dense():
    one = base()
    low = difference(one, moved(one, MATRICES, rank=3))
    assert all(2 <= (low.tensors[name].rank or 0) <= 3 for name in MATRICES)
    assert "a low-rank update, as LoRA makes: in 4 of 4 changed matrices 3 directions" in said(low)
    assert "only attention q, mlp changed" in said(low)
    dense = difference(one, moved(one))
    assert all(dense.tensors[name].rank is None for name in MATRICES)
    assert "a dense update" in said(dense)
    mixed = difference(one, moved(moved(one, MATRICES[:1], rank=2), MATRICES[1:]))
    assert "a mixed update: 1 of 4" in said(mixed)
    assert difference(one, moved(one), ranks=False).model.matrices == 0


def test_a_rank_is_found_as_the_svd_says():
    """The count of directions that hold 90 % of the squared norm, for a spectrum in between."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((80, 80)))[0] for _ in range(2))
    values = 0.8 ** np.arange(80)
    step = (u * values) @ v
    held = np.cumsum(values**2) / (values**2).sum()
    found = difference({"w": np.zeros((80, 80))}, {"w": step})
    assert found.tensors["w"].rank == int(np.flatnonzero(held >= 0.9)[0]) + 1 == 6


def test_low_rank_shows_through_the_rounding_of_sixteen_bits():
    one = base(dtype=ml_dtypes.bfloat16)
    found = difference(one, moved(one, MATRICES, size=0.02, rank=4))
    assert "a low-rank update" in said(found)


def test_only_norms():
    one = base()
    found = difference(one, moved(one, ["model.norm.weight"]))
    assert "only norms changed: 1 of 8 tensors" in said(found)


def test_some_layers_only():
    one = base()
    found = difference(one, moved(one, [n for n in SHAPES if "layers.1" in n]))
    assert "layers 1 changed, layers 0 did not, of 2" in said(found)


def test_only_the_type():
    one = base()
    low = {n: v.astype(ml_dtypes.bfloat16) for n, v in one.items()}
    found = difference(one, low)
    assert "only element types changed" in said(found)
    assert "are the same values, rounded" in said(found)
    assert "8 tensors went from F32 to BF16" in said(found)
    wide = {n: v.astype(np.float32) for n, v in low.items()}
    assert "are the same values |" in said(difference(low, wide))
    more = difference(one, {n: v.astype(ml_dtypes.bfloat16) for n, v in moved(one).items()})
    assert "a dense update" in said(more)


def test_resized_embedding():
    one = base()
    other = moved(one, ["model.norm.weight"])
    other["model.embed_tokens.weight"] = np.concatenate(
        [one["model.embed_tokens.weight"], np.ones((2, 64), np.float32)]
    )
    found = difference(one, other)
    change = found.tensors["model.embed_tokens.weight"]
    assert change.compared == 30 * 64
    assert not change.changed
    assert "(embedding) was resized from 30 to 32 rows; the 30 that both have" in said(found)


def test_added_removed_and_a_shape_that_cannot_be_compared():
    one = base()
    other = {n: v for n, v in moved(one).items() if n != "model.norm.weight"}
    other["lm_head.weight"] = np.zeros((30, 64), np.float32)
    other["model.layers.0.mlp.up_proj.weight"] = np.zeros((96, 32), np.float32)
    found = difference(one, other)
    assert list(found.removed) == ["model.norm.weight"]
    assert found.added == {"lm_head.weight": "F32[30, 64]"}
    assert "1 tensors were removed: model.norm.weight" in said(found)
    assert "the first is model.layers.0.mlp.up_proj.weight: [96, 64] and [96, 32]" in said(found)


def test_another_architecture_is_told_not_refused():
    one = base()
    other = {"model.norm.weight": one["model.norm.weight"]}
    other |= {f"blocks.{i}.w": np.zeros((4, 4), np.float32) for i in range(9)}
    found = difference(one, other)
    assert "different architectures: 1 tensors have a partner, 7 of state dict" in said(found)
    assert "'model.embed_tokens.weight' and 'blocks.0.w'" in said(found)
    assert "different architectures" in found.table()
    assert "blocks.3.w" in found.html()
    with pytest.raises(InputError, match=r"no tensor name in common \('a' and 'b' are"):
        difference({"a": np.zeros(3)}, {"b": np.zeros(3)})


def test_a_prefix_is_seen_through():
    one = base()
    bare = {name.removeprefix("model."): value for name, value in moved(one).items()}
    for first, second, sign in ((one, bare, "-"), (bare, one, "+")):
        found = difference(first, second)
        assert len(found.tensors) == 8
        assert not found.removed
        assert not found.added
        assert found.renamed == f"{sign}model."
    assert "prefix 'model.'" in said(found)


def test_not_a_number_is_a_finding():
    one = base()
    other = moved(one)
    other["model.norm.weight"] = other["model.norm.weight"].copy()
    other["model.norm.weight"][[3, 5]] = [np.nan, np.inf]
    found = difference(one, other)
    assert found.tensors["model.norm.weight"].non_finite == (0, 2)
    assert "holds NaN or infinity in model.norm.weight (2)" in said(found)
    assert np.isfinite(found.model.ratio)


def test_whole_numbers():
    one = {"w": np.ones((3, 3)), "ids": np.arange(4)}
    other = {"w": np.ones((3, 3)), "ids": np.array([0, 1, 2, 7])}
    assert difference(one, other).tensors["ids"].changed == 1


def written(folder, model, config, tokens):
    folder.mkdir()
    Weights.of(model).save(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"model": {"vocab": {t: i for i, t in enumerate(tokens)}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    one = base()
    return [
        written(tmp_path / "base", one, {"rope_theta": 1e4, "a": 1}, "abc"),
        written(tmp_path / "<i>tuned", moved(one), {"rope_theta": 1e6, "a": 1}, "abde"),
    ]


def run(*arguments):
    return CliRunner().invoke(build(), ["diff", *arguments])


def test_configuration_and_tokenizer(folders):
    found = difference(*folders)
    assert found.settings == (("rope_theta", 1e4, 1e6),)
    assert found.files == (("tokenizer.json", "changed: 2 tokens added, 1 removed, 0 renumbered"),)


def test_command(folders, tmp_path):
    page = tmp_path / "changes.html"
    got = run(*folders, "--html", str(page))
    assert got.exit_code == 0, got.output
    for word in ("a dense update", "rope_theta", "tokenizer.json", "attention q"):
        assert word in got.stdout
        assert word in page.read_text("utf-8")
    assert "<i>tuned" not in page.read_text("utf-8")
    told = json.loads(run(*folders, "--json", "--no-ranks").stdout)
    assert told["model"]["matrices"] == 0
    assert told["tensors"]["model.norm.weight"]["kind"] == "norm"
    assert told["config"] == [{"key": "rope_theta", "before": 1e4, "after": 1e6}]


def test_a_folder_that_is_not_there(folders):
    got = run(folders[0], folders[1] + "x")
    assert "no such file or folder" in str(got.exception)

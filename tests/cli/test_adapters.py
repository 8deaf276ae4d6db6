"""`pluribus extract-lora` and `pluribus merge-adapters` on the command line."""

import json

import numpy as np
import pytest
from checkpoints import save, tensors

from pluribus.core.lowrank import adapter
from pluribus.core.weights import Weights

Q = "model.layers.0.self_attn.q_proj.weight"


def delta(folder, name):
    """An adapter's update of one tensor."""
    found = adapter(folder).factors[name]
    b, a = found.b.floats().reshape(-1, found.rank), found.a.floats().reshape(found.rank, -1)
    return found.scale * b.astype(np.float64) @ a


def difference(name, model="math"):
    def read(folder):
        source = Weights.open(folder).source(name)
        return source.floats(wide=np.float64).reshape(source.spec.shape)

    return read(model) - read("base")


@pytest.fixture
def adapters(cli, place):
    """Adapters of rank 4 of math and code, without what is no linear layer."""
    for name in ("math", "code"):
        words = ["--rank", "4", "--embed", "skip", "--skip-undecomposable", "--quiet"]
        assert cli("extract-lora", name, "base", f"{name}-lora", *words).code == 0
    return place


# -- extract-lora ----------------------------------------------------------------------------------


def test_extraction_keeps_what_the_svd_says(cli, place):
    got = cli("extract-lora", "math", "base", "out", "--rank", 3, "--json")
    assert got.code == 0, got
    assert got.err == ""
    told = got.json
    modules = {one["name"]: one for one in told["modules"]}
    s = np.linalg.svd(difference(Q), compute_uv=False)
    kept = float((s[:3] ** 2).sum() / (s**2).sum())
    assert modules[Q]["rank"] == 3
    assert modules[Q]["kept"] == pytest.approx(kept, abs=1e-5)
    left = difference(Q) - delta("out", Q)
    assert modules[Q]["max_error"] == pytest.approx(float(np.abs(left).max()), abs=1e-6)
    assert modules["model.norm.weight"]["action"] == "saved"
    assert modules["model.embed_tokens.weight"]["action"] == "saved"
    energies = np.array([one["energy"] for one in told["modules"]])
    shares = np.array([one["kept"] for one in told["modules"]])
    assert told["kept"] == pytest.approx(float((energies * shares).sum() / energies.sum()))
    assert told["max_error"] == max(one["max_error"] for one in told["modules"])


def test_full_rank_is_the_fine_tuned_model(cli, place):
    got = cli("extract-lora", "math", "base", "out", "--base-model", "some/base")
    assert got.code == 0, got
    first, second = got.out.splitlines()
    assert first == "out: 7 modules of rank 16 to 16, 5 tensors saved whole"
    assert second.startswith("read back: 100.00% of the update's energy kept, worst 100.00%")
    assert (
        json.loads((place / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "some/base"
    )
    opened = Weights.open("base+out")
    for name in Weights.open("math"):
        np.testing.assert_allclose(
            opened.source(name).floats(), Weights.open("math").source(name).floats(), rtol=2**-7
        )


def test_options_reach_the_adapter(cli, place):
    words = "--energy 0.5 -i q_proj -i up_proj -e layers.1 --embed lora --dtype bfloat16 --json"
    got = cli("extract-lora", "math", "base", "out", *words.split())
    assert got.code == 0, got
    modules = {one["name"]: one for one in got.json["modules"] if one["action"] == "lora"}
    assert set(modules) == {
        f"model.layers.{k}.{part}.weight" for k in (0, 2) for part in ("self_attn.q_proj",
                                                                       "mlp.up_proj")
    }  # fmt: skip
    s = np.linalg.svd(difference(Q), compute_uv=False)
    assert modules[Q]["rank"] == 1 + int((np.cumsum(s**2) < 0.5 * (s**2).sum()).sum())
    written = Weights.open("out/adapter_model.safetensors").spec.values()
    assert {spec.dtype for spec in written} == {"BF16"}
    assert "changed but are not in the adapter" in got.err
    assert got.err.count("\n") == 1


def test_saved_modules_and_undistributed_scale(cli, place):
    words = "--rank 2 --save-module lm_head --no-distribute-scale --skip-undecomposable --quiet"
    got = cli("extract-lora", "math", "base", "out", *words.split(), "--json")
    modules = {one["name"]: one["action"] for one in got.json["modules"]}
    assert modules["lm_head.weight"] == "saved"
    assert modules["model.norm.weight"] == "skipped"
    b = adapter("out").factors[Q].b.floats().reshape(-1, 2)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), 1, rtol=1e-5)


# -- merge-adapters --------------------------------------------------------------------------------


def test_merged_exactly(cli, adapters):
    words = ["--mode", "cat", "--weight", "0.7", "--weight", "-0.3"]
    got = cli("merge-adapters", "math-lora", "code-lora", "out", *words, "--json")
    assert got.code == 0, got
    assert got.json["adapters"] == ["math-lora", "code-lora"]
    assert got.json["kept"] == pytest.approx(1)
    assert {one["rank"] for one in got.json["modules"]} == {8}
    wanted = 0.7 * delta("math-lora", Q) - 0.3 * delta("code-lora", Q)
    np.testing.assert_allclose(delta("out", Q), wanted, atol=1e-6)


def test_the_average_is_the_default(cli, adapters):
    got = cli("merge-adapters", "math-lora", "code-lora", "out", "--rank", 2)
    assert got.code == 0, got
    assert got.err == ""
    assert got.out.startswith("out: 7 modules of rank 2 to 2; ")
    mean = (delta("math-lora", Q) + delta("code-lora", Q)) / 2
    u, s, vh = np.linalg.svd(mean)
    np.testing.assert_allclose(delta("out", Q), u[:, :2] * s[:2] @ vh[:2], atol=1e-6)


def test_any_method(cli, adapters):
    args = ("merge-adapters", "math-lora", "code-lora")
    got = cli(*args, "out", "--method", "ties(density=0.5)", "--rank", 16, "--json")
    assert got.code == 0, got
    from pluribus.engine.reference import merge_arrays
    from pluribus.merge.ties import Ties

    pair = [{Q: delta(f"{name}-lora", Q).astype(np.float32)} for name in ("math", "code")]
    zero = {Q: np.zeros((16, 16), np.float32)}
    wanted = merge_arrays(Ties(density=0.5), zero, pair)[Q]
    np.testing.assert_allclose(delta("out", Q), wanted, atol=1e-5)


# -- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("extract-lora nope base out", "nope: no such file or folder"),
        ("extract-lora base base out", "they are equal"),
        ("extract-lora math base out --rank 0", "rank = 0: give at least 1"),
        ("extract-lora math base out --energy 2", "energy = 2.0: give a share in (0, 1]"),
        ("extract-lora math base out --embed sav", "Did you mean 'save'?"),
        ("extract-lora math base out --dtype float8", "dtype = 'float8': give float32 or "),
        ("extract-lora math base out -i (", "'(' is not a regular expression"),
        ("extract-lora math base math-lora", "math-lora: exists; give another name, or"),
        ("extract-lora math base code --overwrite", "code: exists and is not an adapter"),
        ("merge-adapters math-lora math out", "adapter_config.json"),
        ("merge-adapters math-lora code-lora out --method tie", "Did you mean 'ties'?"),
        ("merge-adapters math-lora code-lora out --mode cut", "mode = 'cut': give svd or "),
        ("merge-adapters math-lora code-lora out --weight 1", "1 weights were given for 2"),
        ("merge-adapters math-lora code-lora out --method ties --mode cat", "linear method"),
        ("merge-adapters math-lora code-lora math-lora", "math-lora: exists; give another name"),
        ("merge-adapters math-lora code-lora out --method regmean", "regmean needs"),
    ],
)
def test_what_cannot_be_done(refused, adapters, words, said):
    assert said in refused(*words.split())


def test_adapters_of_different_bases(cli, refused, adapters):
    path = adapters / "code-lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "other"}))
    args = ("merge-adapters", "math-lora", "code-lora", "out")
    assert "different bases" in refused(*args)
    assert cli(*args, "--base-model", "base").code == 0
    written = json.loads((adapters / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "base"


def test_adapters_are_replaced_on_request(cli, adapters):
    before = delta("math-lora", Q)
    words = ["--rank", "1", "--embed", "skip", "--skip-undecomposable", "--overwrite", "--quiet"]
    assert cli("extract-lora", "code", "base", "math-lora", *words).code == 0
    assert not np.allclose(delta("math-lora", Q), before)
    assert adapter("math-lora").factors[Q].rank == 1


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        ("extract-lora math base out", ["factoring", "reading it back"]),
        ("merge-adapters math-lora code-lora out", ["merging"]),
    ],
)
def test_progress_goes_to_stderr_and_can_be_silenced(cli, adapters, words, stages):
    got = cli(*words.split(), terminal=True)
    assert got.code == 0, got
    for stage in stages:
        assert stage in got.err
        assert stage not in got.out
    got = cli(*words.split(), "--quiet", "--overwrite", terminal=True)
    assert not any(stage in got.err for stage in stages)


def test_an_update_of_low_rank_is_found(cli, place):
    """A fine-tune of rank 2 in float32 comes back to rounding error."""
    values = tensors(0)
    rng = np.random.default_rng(7)
    save(place / "b.safetensors", values, "float32")
    low = rng.standard_normal((16, 2), np.float32) @ rng.standard_normal((2, 16), np.float32)
    save(place / "m.safetensors", {**values, Q: values[Q] + low}, "float32")
    told = cli("extract-lora", "m.safetensors", "b.safetensors", "out", "--rank", 2, "--json").json
    assert told["kept"] == pytest.approx(1, abs=1e-9)
    assert told["max_error"] < 1e-5
    assert [one["name"] for one in told["modules"] if one["action"] != "unchanged"] == [Q]

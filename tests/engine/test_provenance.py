"""What an output says of itself, and how it is checked."""

import json

import numpy as np
import pytest
import torch

from pluribus.core.errors import FormatError, MissingError
from pluribus.core.pool import Pool
from pluribus.core.weights import Weights
from pluribus.engine import provenance
from pluribus.engine.driver import merge, plan_pool
from pluribus.merge.linear import Linear
from pluribus.merge.ties import Ties

SHAPES = {"a": (40, 30), "b": (17,), "c": (25, 40), "empty": (0, 2), "scalar": ()}


@pytest.fixture
def pool(models):
    return models.write(2, SHAPES, ["BF16"])


def record(out):
    return json.loads(provenance.sidecar(out).read_bytes())


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("shard", [None, 1000])
def test_a_whole_output_has_no_faults(pool, tmp_path, small_blocks, name, shard):
    merge(pool, Ties(density=0.3), tmp_path / name, max_shard_size=shard)
    assert list(provenance.verify(tmp_path / name)) == []


def shard_of(out, tensor):
    """Return the file, and the bytes' range, of one tensor of an output."""
    source = Weights.open(out).source(tensor)
    return source.path, source.offset, source.offset + source.spec.nbytes


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("tensor", ["a", "b", "c", "scalar"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_found_and_named(pool, tmp_path, small_blocks, name, tensor, where):
    out = tmp_path / name
    merge(pool, Linear(), out, max_shard_size=1000)
    path, start, stop = shard_of(out, tensor)
    with open(path, "r+b") as file:
        file.seek(start + int((stop - start) * where))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert list(provenance.verify(out)) == [(tensor, "differs from what was written")]


def test_tensors_that_came_or_went_are_named(pool, tmp_path):
    out = tmp_path / "out.safetensors"
    got = merge(pool, Linear(), out)
    changed = {name: got[name] for name in got if name != "b"} | {"extra": torch.ones(2)}
    Weights.of(changed).save(out)
    assert set(provenance.verify(out)) == {("extra", "is not in the record"), ("b", "is missing")}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"output": 3}', '{"output": {"tensors": {"a": {}}}}', "\udcff"]
)
def test_a_record_that_is_none(pool, tmp_path, text):
    out = tmp_path / "out"
    merge(pool, Linear(), out)
    (out / "pluribus.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match="not a record of pluribus"):
        list(provenance.verify(out))


def test_without_an_output_or_a_record(models, tmp_path):
    with pytest.raises(MissingError, match="no such file or folder"):
        list(provenance.verify(tmp_path / "nothing"))
    models.write(1)
    with pytest.raises(MissingError, match="only outputs of pluribus can be verified"):
        list(provenance.verify(models.folder / "e0"))


def test_two_runs_write_the_same_record(pool, tmp_path):
    texts = []
    for number in range(2):
        out = tmp_path / str(number)
        merge(pool, Ties(density=0.3), out)
        texts.append((out / "pluribus.json").read_bytes())
    assert texts[0] == texts[1]


def test_digests_depend_on_values_alone(pool, models, tmp_path, small_blocks):
    """Not on threads, shards, place, or whether the inputs are files."""
    found = []
    runs = [(1, None, pool), (5, 700, models.pool()), (2, 3000, models.in_memory())]
    for number, (threads, shard, inputs) in enumerate(runs):
        out = tmp_path / f"o{number}"
        merge(inputs, Ties(density=0.3), out, threads=threads, max_shard_size=shard)
        table = record(out)
        inputs = {label: entry for label, entry in table["inputs"].items() if label[0] == "e"}
        found.append((table["output"], inputs))
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]) == 2


def test_the_record_holds_what_is_needed_to_do_it_again(pool, tmp_path):
    method = Ties(density=0.3, weight=(1.0, 2.0))
    merge(pool, method, tmp_path / "out", seed=5)
    table = record(tmp_path / "out")
    assert table["seed"] == 5
    assert table["recipe"]["merge_method"] == "ties"
    assert table["recipe"]["parameters"]["density"] == 0.3
    assert table["recipe"]["parameters"]["weight"] == [1.0, 2.0]
    assert set(table["inputs"]) == {pool.base.label, "e0", "e1"}
    assert all(entry["tensors"] == 4 for entry in table["inputs"].values())  # one has no values
    assert set(table["output"]["tensors"]) == set(SHAPES)
    head = Weights.open(tmp_path / "out").metadata["pluribus"]
    assert json.loads(head)["plan"] == table["plan"] == plan_pool(pool, method, seed=5).digest()


@pytest.mark.parametrize("label", ["out", "in", "base", "journal", "\u00e9t\u00e9"])
def test_a_model_may_have_any_name(pool, tmp_path, small_blocks, label):
    named = Pool(pool.base, {label: pool.experts["e0"], "other": pool.experts["e1"]})
    merge(named, Linear(), tmp_path / "merged")
    merge(pool, Linear(), tmp_path / "plain")
    named, plain = record(tmp_path / "merged"), record(tmp_path / "plain")
    assert named["output"] == plain["output"]
    assert named["inputs"][label] == plain["inputs"]["e0"]
    assert list(provenance.verify(tmp_path / "merged")) == []


def test_a_model_that_takes_part_twice_is_hashed_once(pool, models, tmp_path, small_blocks):
    base = models.folder / "base"
    merge(Pool(base, [base, models.folder / "e0"]), Ties(), tmp_path / "twice")
    merge(Pool(base, [models.folder / "e0"]), Ties(), tmp_path / "once")
    assert record(tmp_path / "twice")["inputs"] == record(tmp_path / "once")["inputs"]


def test_whole_numbers_count_for_every_model(models, tmp_path):
    """Buffers are compared in all models, so each model's digest covers them."""
    pool = models.write(2, {"w": (9,), "i": (5,)}, [{"w": "F32", "i": "I64"}])
    merge(pool, Ties(), tmp_path / "out")
    assert {entry["tensors"] for entry in record(tmp_path / "out")["inputs"].values()} == {2}


def test_the_digest_of_an_output_is_that_of_the_same_model_as_an_input(pool, tmp_path):
    """What one merge wrote and the next one read is told to be the same."""
    merge(pool, Linear(), tmp_path / "first")
    merge(Pool(None, {"first": tmp_path / "first"}), Linear(), tmp_path / "second")
    first, second = record(tmp_path / "first"), record(tmp_path / "second")
    for name in ("a", "b", "c", "scalar"):
        assert first["output"]["tensors"][name] == second["output"]["tensors"][name]


def test_equal_inputs_are_noticed(pool, tmp_path):
    from pluribus.engine.driver import Options, execute

    copy = Weights.of({name: tensor.clone() for name, tensor in pool.experts["e0"].items()})
    twins = Pool(pool.base, {"e0": pool.experts["e0"], "copy": copy})
    result = execute(plan_pool(twins, Ties()), None, Options())
    assert any("copy and e0 hold the same values" in note for note in result.warnings) or any(
        "e0 and copy hold the same values" in note for note in result.warnings
    )


def test_configuration_and_tokenizer_go_along(models, tmp_path):
    pool = models.write(2, {"w": (3,)})
    folder = models.folder / "base"
    (folder / "config.json").write_text('{"model_type": "toy", "torch_dtype": "float32"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "pluribus.json").write_text("old")
    (folder / "optimizer.pt").write_bytes(b"big")
    merge(pool, Linear(), tmp_path / "out", out_dtype="bfloat16")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "pluribus.json",
        "tokenizer.json",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "toy", "torch_dtype": "bfloat16"}
    assert record(tmp_path / "out")["pluribus"]


def test_the_index_of_a_sharded_output_is_whole(pool, tmp_path):
    merge(pool, Linear(), tmp_path / "out", max_shard_size=1000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert 0 < index["metadata"]["total_size"] == pool.base.nbytes < size
    opened = Weights.open(tmp_path / "out")
    np.testing.assert_array_equal(opened["a"].float(), merge(pool, Linear())["a"].float())


def test_outputs_are_read_by_safetensors_itself(pool, tmp_path):
    from safetensors.torch import load_file

    got = merge(pool, Linear(), tmp_path / "out.safetensors")
    loaded = load_file(tmp_path / "out.safetensors")
    assert set(loaded) == set(SHAPES)
    assert all(torch.equal(loaded[name], got[name]) for name in SHAPES)

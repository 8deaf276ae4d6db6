"""Repositories of a Hugging Face hub: from its local cache if they are there, else streamed.

`org/name` or `hf://org/name`, with an optional revision, is looked for in the cache that
huggingface-hub keeps (HF_HUB_CACHE, HF_HOME); a cached revision is used as it is, without asking
whether the hub has a newer one. Otherwise its safetensors are read by ranges from HF_ENDPOINT, with
HF_TOKEN if it is set. HF_HUB_OFFLINE=1 forbids the latter.
"""

import os
import re
from pathlib import Path
from urllib.parse import quote

from pluribus.core.errors import InputError, MissingError, NetworkError, PluribusError, need
from pluribus.core.refs import Place
from pluribus.core.remote import Patience, Remote, open_url
from pluribus.core.weights import Weights, beside, shard_names

ENDPOINT = "https://huggingface.co"
ADAPTER = "adapter_config.json"
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]


def open_repo(place: Place, *, patience: Patience | None = None) -> Weights:
    """Open a hub repository's weights; nothing but headers and small files is downloaded.

    Raises MissingError or NetworkError saying how to put the model where it is found.
    """
    repo, revision = named(place)
    local = cached(repo, revision)
    if local is not None:
        return Weights.open({"model": {"path": str(local)}}, label=str(place))
    _must_be_online(place)
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN") or None
    url = f"{endpoint}/{repo}/resolve/{quote(revision, safe='')}"
    try:
        return open_url(url, token=token, patience=patience, label=str(place))
    except MissingError as error:
        if _has(f"{url}/{ADAPTER}", token, patience):
            return Weights.open({"model": {"path": str(snapshot(place))}}, label=str(place))
        raise MissingError(
            f"{place}: no such file or folder here, and no safetensors at {endpoint} ({error}). "
            + _advice(repo)
        ) from None
    except NetworkError as error:
        raise NetworkError(
            f"{place}: no such file or folder here, and reading it from {endpoint} failed: "
            f"{error}. {_advice(repo)}"
        ) from None


def snapshot(place: Place) -> Path:
    """Return a local folder with a repository's files, downloaded into the hub's cache if need be.

    Raises MissingError or NetworkError as `open_repo`, ExtraError without huggingface-hub.
    """
    repo, revision = named(place)
    local = cached(repo, revision)
    if local is not None:
        return local
    _must_be_online(place)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    except ImportError:
        raise need("huggingface-hub", "hf", f"downloading {repo}") from None
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache(),
            endpoint=os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/"),
            token=os.environ.get("HF_TOKEN") or None,
            allow_patterns=WANTED,
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        kind = MissingError if status in (401, 403, 404) else NetworkError
        raise kind(f"{place}: {str(error).strip().splitlines()[0]}. {_advice(repo)}") from None
    except (EntryNotFoundError, OSError) as error:
        raise NetworkError(
            f"{place}: could not be downloaded ({str(error).strip().splitlines()[0]}). "
            + _advice(repo)
        ) from None
    return Path(folder)


def named(place: Place) -> tuple[str, str]:
    """Return repository and revision of a place. Raises InputError for what is not org/name."""
    repo = place.path.removeprefix("hf://")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo) or ".." in repo:
        raise InputError(f"{place.path!r} is not a hub repository; those are written org/name")
    revision = place.revision or "main"
    if revision.startswith("/") or ".." in revision or "\\" in revision:
        raise InputError(f"{place.revision!r} is not a revision")
    return repo, revision


def cache() -> Path:
    """Return huggingface-hub's cache: $HF_HUB_CACHE, else $HF_HOME/hub, else the usual folder."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def cached(repo: str, revision: str) -> Path | None:
    """Return the cache's snapshot of a revision if it holds a whole checkpoint or adapter."""
    folder = cache() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text("utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    found = folder / "snapshots" / commit
    if not commit or not found.is_dir():
        return None
    if (found / ADAPTER).is_file():
        names = ("adapter_model.safetensors", "adapter_model.bin")
        return found if any((found / name).is_file() for name in names) else None
    try:
        shards = shard_names(found)
    except PluribusError:
        return None
    return found if all((found / shard).is_file() for shard in shards) else None


def _must_be_online(place: Place) -> None:
    """Raise MissingError if the hub must not be asked, or is not what was meant."""
    repo, revision = named(place)
    path = Path(place.path)
    if not place.path.startswith("hf://") and path.parent.is_dir():
        raise MissingError(
            f"{path}: no such file or folder.{beside(path)} The hub's repository of that name is "
            f"hf://{repo}"
        )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise MissingError(
            f"{repo}: no such file or folder here, HF_HUB_OFFLINE is set, and its revision "
            f"{revision} is not whole in {cache()}. {_advice(repo)}"
        )


def _advice(repo: str) -> str:
    return (
        f"Fetch it where there is a network ('hf download {repo} --local-dir FOLDER'), copy the "
        "folder here and give its path"
    )


def _has(url: str, token: str | None, patience: Patience | None) -> bool:
    try:
        Remote(url, token=token, patience=patience).whole()
    except (MissingError, NetworkError):
        return False
    return True

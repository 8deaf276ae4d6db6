"""A knowledge base on disk: points as safetensors, everything else as JSON.

    FOLDER/points-DIGEST.safetensors    POINT.mu.NAME and POINT.sigma.NAME
    FOLDER/knowledge.json               settings, tasks, the reuse map, the name of the points' file

The file of points is written under a name of its own first; replacing `knowledge.json` by a rename
is what makes it count. Whoever is interrupted leaves the old state whole.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pluribus.core.errors import FormatError, MissingError, OutputError, PluribusError
from pluribus.core.weights import Weights
from pluribus.core.whole import whole_file
from pluribus.train.continual.posterior import GaussianPosterior

if TYPE_CHECKING:
    from pluribus.train.continual.ibcl import CredalBase

HEAD = "knowledge.json"
VERSION = 1
SETTINGS = (
    *("prior_stds", "d_thr", "distance", "kl_weight", "warm_start", "epochs", "steps", "lr"),
    *("batch_size", "seed"),
)
Shape = tuple[tuple[int, ...] | None, int | None]


def save(base: "CredalBase", folder: Path) -> Path:
    """Write a knowledge base and return its folder. Raises OutputError if it holds other things."""
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; a knowledge base is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / HEAD).is_file():
        raise OutputError(f"{folder}: holds something else; name a new or empty folder")
    tensors = {
        f"{number}.{part}.{name}": tensor
        for number, point in enumerate(base.points)
        for part, state in (("mu", point.mu), ("sigma", point.sigma))
        for name, tensor in state.items()
    }
    digest = _digest(tensors)
    file = f"points-{digest[:16]}.safetensors"
    told = {
        "version": VERSION,
        "settings": base.settings(),
        "tasks": [learned._asdict() for learned in base.learned],
        "reuse": base.reuse,
        "features": base.network.features,
        "outputs": base.network.outputs,
        "points": len(base.points),
        "file": file,
        "digest": digest,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Weights.of(tensors).save(folder / file)
        with whole_file(folder / HEAD) as part:
            part.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    except OSError as error:
        if isinstance(error, PluribusError):
            raise
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    for old in folder.glob("points-*.safetensors"):
        if old.name != file:
            old.unlink(missing_ok=True)
    return folder


def load(
    folder: Path,
) -> tuple[dict[str, Any], list[GaussianPosterior], list[dict[str, Any]], Shape]:
    """Return settings, points, what each task added, and the shapes of the network's data.

    Raises MissingError, FormatError or, for standard deviations of 0 or less, InputError.
    """
    folder = folder.expanduser()
    head = folder / HEAD
    if not head.is_file():
        raise MissingError(f"{head}: no such file; give a folder that CredalBase.save wrote")
    try:
        told = json.loads(head.read_text("utf-8"))
        if told["version"] != VERSION:
            raise FormatError(f"{head}: version {told['version']}, but this one reads {VERSION}")
        file, digest = told["file"], told["digest"]
        settings = {key: told["settings"][key] for key in SETTINGS}
        if unread := sorted(set(told["settings"]) - set(SETTINGS)):
            raise FormatError(f"{head}: unknown setting {unread[0]!r}")
        learned = [_entry(entry) for entry in told["tasks"]]
        features = told["features"]
        shape = (None if features is None else tuple(features), told["outputs"])
        amount = int(told["points"])
        if Path(file).name != file:
            raise FormatError(f"{head}: {file!r} is not a plain file name")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{head}: not a knowledge base ({error!r})") from None
    unknown = [n for entry in learned for n in entry["points"] if not 0 <= n < amount]
    if unknown:
        raise FormatError(f"{head}: the reuse map names point {unknown[0]} of {amount}")
    if not (folder / file).is_file():
        raise MissingError(f"{folder / file}: named by {HEAD}, but not there")
    weights = Weights.open(folder / file)
    tensors = {name: weights[name] for name in weights}
    points = [_point(tensors, number, folder / file) for number in range(amount)]
    if _digest(tensors) != digest:
        raise FormatError(f"{folder / file}: is not as it was written; restore it or learn anew")
    return settings, points, learned, shape


def _entry(told: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(told)
    for key in ("points", "stored", "nearest"):
        out[key] = tuple(told[key])
    return {key: out[key] for key in ("task", "points", "stored", "nearest", "examples", "steps")}


def _point(tensors: Mapping[str, Any], number: int, where: Path) -> GaussianPosterior:
    def state(part: str) -> dict[str, Any]:
        head = f"{number}.{part}."
        return {name[len(head) :]: t for name, t in tensors.items() if name.startswith(head)}

    if not state("mu"):
        raise FormatError(f"{where}: has no point {number}")
    return GaussianPosterior(state("mu"), state("sigma"))


def _digest(tensors: Mapping[str, Any]) -> str:
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        array: Sequence[Any] = tensors[name].contiguous().numpy()
        state.update(f"{name}\0{array.dtype}{list(array.shape)}".encode())  # type: ignore[attr-defined]
        state.update(array.tobytes())  # type: ignore[attr-defined]
    return state.hexdigest()

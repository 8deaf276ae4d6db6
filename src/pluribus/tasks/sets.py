"""Data sets by name: embedded, then the user's folder, then the cache, then the public source.

An image set is an .npz with `x_train y_train x_test y_test classes`, a text set a .jsonl.gz (see
`texts`). They are looked for in this order:

    1. inside the package        digits (scikit-learn's load_digits, CC BY 4.0, see data/NOTICE)
    2. $PLURIBUS_DATA            vision/NAME.npz or text/NAME.jsonl.gz, then without the folder
    3. $PLURIBUS_CACHE/data      the same two; the cache folder defaults to ~/.cache/pluribus
    4. the public source         text sets that `download` knows with their checksums

Pixels come as stored, in the range 0..`peak`: 255 for most sets, 16 for digits.
"""

import os
import zipfile
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pluribus.core.errors import FormatError, MissingError, NetworkError, listing, nearest
from pluribus.core.shapes import UInt8
from pluribus.tasks.texts import TextSet, labelled, rows

EMBEDDED = ("digits",)
ARRAYS = ("x_train", "y_train", "x_test", "y_test", "classes")


class DataError(MissingError):
    """A data set that none of the known places holds."""


class Kind(NamedTuple):
    """Where files of a kind lie, which are embedded, and what one holds."""

    told: str
    folder: str
    ending: str
    embedded: tuple[str, ...]
    holds: str


IMAGES = Kind("image", "vision", ".npz", EMBEDDED, f"the arrays {' '.join(ARRAYS)}")
TEXTS = Kind(
    "text", "text", ".jsonl.gz", (), "one JSON object a line: text or a and b, label, split"
)


class Located(NamedTuple):
    """Where a set was found, and the file (None for an embedded one)."""

    place: str  # "embedded", "PLURIBUS_DATA", "cache" or "public source" (not here yet)
    path: Path | None


class ImageSet(NamedTuple):
    """Images with labels, split as their file splits them; colour images have a last axis."""

    x_train: UInt8[np.ndarray, "b h w *c"]
    y_train: UInt8[np.ndarray, " b"]
    x_test: UInt8[np.ndarray, "a h w *c"]
    y_test: UInt8[np.ndarray, " a"]
    classes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The brightest value of the training images, which is what 1.0 means."""
        return int(self.x_train.max())


def cache_folder() -> Path:
    """Return $PLURIBUS_CACHE, or ~/.cache/pluribus; it need not exist."""
    return Path(os.environ.get("PLURIBUS_CACHE") or "~/.cache/pluribus").expanduser()


def images(name: str) -> ImageSet:
    """Return the named set; `DataError` says where it was looked for and what to set."""
    if name in EMBEDDED:
        with (resources.files("pluribus.tasks") / "data" / f"{name}.npz").open("rb") as file:
            return _read(file, f"the embedded {name}.npz")
    path = _found(name, IMAGES)
    with path.open("rb") as file:
        return _read(file, str(path))


def texts(name: str) -> TextSet:
    """Return the named labelled text set; `DataError` says where it was looked for."""
    path = _found(name, TEXTS)
    return labelled(rows(path), str(path))


def records(name: str) -> list[dict[str, Any]]:
    """Return the rows of the named text set with whatever fields its file gives them."""
    return rows(_found(name, TEXTS))


def locate(name: str, kind: Kind) -> Located | None:
    """Return where a set would be read from, without reading or fetching it; None if nowhere."""
    if name in kind.embedded:
        return Located("embedded", None)
    for place, folder in _folders().items():
        for under in (folder / kind.folder, folder):
            path = under / f"{name}{kind.ending}"
            if path.parent == under and path.is_file():
                return Located(place, path)
    if kind is TEXTS and name in _origins():
        return Located("public source", None)
    return None


def _found(name: str, kind: Kind) -> Path:
    located = locate(name, kind)
    if located is None:
        raise missing(name, kind)
    if located.path is not None:
        return located.path
    from pluribus.tasks.download import offline, text_set

    if offline():
        raise missing(name, kind)
    try:
        return text_set(name, cache_folder() / "data")
    except NetworkError as error:
        raise NetworkError(
            f"{error}; or set PLURIBUS_DATA to a folder that holds text/{name}.jsonl.gz"
        ) from None


def _origins() -> tuple[str, ...]:
    from pluribus.tasks.sources import ORIGINS

    return tuple(ORIGINS)


def _folders() -> dict[str, Path]:
    own = os.environ.get("PLURIBUS_DATA")
    mine = {"PLURIBUS_DATA": Path(own).expanduser()} if own else {}
    return mine | {"cache": cache_folder() / "data"}


def missing(name: str, kind: Kind) -> DataError:
    """Return the error for a set that is not here: where it was looked for, and what to do."""
    from pluribus.tasks.download import offline

    folders = list(_folders().values())
    known = sorted(_present(folders, kind).union(kind.embedded))
    unset = "" if len(folders) > 1 else " (PLURIBUS_DATA is not set)"
    file = f"{kind.folder}/{name}{kind.ending}"
    variable = offline() if kind is TEXTS and name in _origins() else None
    fetched = f" Or unset {variable}, to have it downloaded." if variable else ""
    return DataError(
        f"no {kind.told} set '{name}': looked for {file} and {name}{kind.ending} in "
        f"{' and '.join(map(str, folders))}{unset}; found there or embedded: "
        f"{listing(known, 12) or 'nothing'}."
        f"{nearest(name, known)} Set PLURIBUS_DATA to a folder that holds {file} "
        f"with {kind.holds}.{fetched}"
    )


def _present(folders: list[Path], kind: Kind) -> set[str]:
    return {
        path.name.removesuffix(kind.ending)
        for folder in folders
        for place in (folder / kind.folder, folder)
        for path in place.glob(f"*{kind.ending}")
    }


def _read(file: IO[bytes], where: str) -> ImageSet:
    try:
        with np.load(file, allow_pickle=False) as stored:
            if lacking := [key for key in ARRAYS if key not in stored]:
                raise FormatError(f"{where} lacks the arrays {' '.join(lacking)}")
            x_train, y_train, x_test, y_test, classes = (stored[key] for key in ARRAYS)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where} is not a readable .npz: {error}") from error
    for x, y, split in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) != len(y) or not len(x):
            raise FormatError(
                f"{where}: x_{split} is {x.dtype}{list(x.shape)} with {len(y)} labels, "
                "expected uint8 images (b, h, w) or (b, h, w, c) with one label each"
            )
        if y.min() < 0 or y.max() >= len(classes):
            raise FormatError(
                f"{where}: y_{split} spans {y.min()}..{y.max()} but there are "
                f"{len(classes)} classes"
            )
    labels = (y_train.astype(np.uint8), y_test.astype(np.uint8))
    return ImageSet(x_train, labels[0], x_test, labels[1], tuple(map(str, classes)))

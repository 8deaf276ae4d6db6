"""Image sets by name: embedded, then the user's folder, then the cache; never the network.

A set is an .npz with `x_train y_train x_test y_test classes`, looked for in this order:

    1. inside the package        digits (scikit-learn's load_digits, CC BY 4.0, see data/NOTICE)
    2. $PLURIBUS_DATA            vision/NAME.npz, then NAME.npz
    3. $PLURIBUS_CACHE/data      the same two; the cache folder defaults to ~/.cache/pluribus

Pixels come as stored, in the range 0..`peak`: 255 for most sets, 16 for digits.
"""

import os
import zipfile
from importlib import resources
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from pluribus.core.errors import FormatError, MissingError, listing, nearest
from pluribus.core.shapes import UInt8

EMBEDDED = ("digits",)
ARRAYS = ("x_train", "y_train", "x_test", "y_test", "classes")


class DataError(MissingError):
    """A data set that none of the known places holds."""


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
    folders = _folders()
    for folder in folders:
        for path in (folder / "vision" / f"{name}.npz", folder / f"{name}.npz"):
            if path.parent in (folder, folder / "vision") and path.is_file():
                with path.open("rb") as file:
                    return _read(file, str(path))
    raise DataError(_missing(name, folders))


def _folders() -> list[Path]:
    own = os.environ.get("PLURIBUS_DATA")
    return ([Path(own).expanduser()] if own else []) + [cache_folder() / "data"]


def _missing(name: str, folders: list[Path]) -> str:
    here = {path.stem for f in folders for path in [*f.glob("vision/*.npz"), *f.glob("*.npz")]}
    known = sorted(here.union(EMBEDDED))
    unset = "" if len(folders) > 1 else " (PLURIBUS_DATA is not set)"
    return (
        f"no image set '{name}': looked for vision/{name}.npz and {name}.npz in "
        f"{' and '.join(map(str, folders))}{unset}; found there or embedded: {listing(known, 12)}."
        f"{nearest(name, known)} Set PLURIBUS_DATA to a folder that holds vision/{name}.npz "
        f"with the arrays {' '.join(ARRAYS)}."
    )


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

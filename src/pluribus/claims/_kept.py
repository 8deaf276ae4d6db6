"""Figures of a seed that was measured before, for as long as what measured them is the same.

A file holds, beside the figures, digests of what had been loaded when they were there: every module
of this package; in its folders, the names of modules that were not (a new method may join a list
that a claim goes through), and all other files. The command line is left out, since no claim runs
it, and so are the names of other claims. Where a loaded module starts processes of its own, what
those load isn't seen, and every file of the package counts.

If any of these, or torch, numpy or Python (whose own library some claims read as text), is another
now, the seed is measured anew.
"""

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from pluribus.core.whole import whole_file

PACKAGE = Path(__file__).parents[1]
ASIDE = ("cli/", "__main__.py")  # of the package: started by users, loaded by no claim
UNLISTED = "claims/"
STARTS = re.compile(r"^\s*(import|from) (subprocess|multiprocessing|ray)\b|optional\(.ray.", re.M)
EVERY = "*"
VERSIONS = {
    "numpy": numpy.__version__,
    "torch": str(torch.__version__),
    "python": platform.python_version(),
}
Files = Mapping[str, str]  # digests, by path in the package


def snapshot(package: Path = PACKAGE) -> Files:
    """Return digests of all files of the package, and the versions of the libraries."""
    found = dict(VERSIONS)
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = path.relative_to(package).as_posix()
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def keys(loaded: Iterable[str], package: Path = PACKAGE) -> list[str]:
    """Return what figures depend on, given all files that were loaded.

    A path stands for a file, `FOLDER/` for the names of its modules and for its other files, `*`
    for everything.
    """
    paths = [Path(file) for file in loaded if Path(file).is_relative_to(package)]
    names = {path.relative_to(package).as_posix() for path in paths}
    names = {name for name in names if not name.startswith(ASIDE)}
    if any(STARTS.search((package / name).read_text()) for name in names):
        return [EVERY]
    folders = {name[: name.rfind("/") + 1] or "/" for name in names}
    return sorted({*names, *folders, *VERSIONS})


def digest(files: Files, key: str) -> str:
    """Return the digest of what a key stands for."""
    if key == EVERY:
        return _hash(files)
    if not key.endswith("/"):
        return files.get(key, "")
    inside = {name: own for name, own in files.items() if name.startswith(key) or key == "/"}
    direct = {name for name in inside if "/" not in name.removeprefix(key)}
    modules = {name for name in direct if name.endswith(".py") and key != UNLISTED}
    others = {n: own for n, own in inside.items() if not n.endswith(".py")}
    if key == "/":
        others = {name: own for name, own in others.items() if name in direct - set(VERSIONS)}
    return _hash({**dict.fromkeys(modules, ""), **others})


def _hash(told: Files) -> str:
    return hashlib.sha256(json.dumps(dict(told), sort_keys=True).encode()).hexdigest()[:16]


def read(folder: Path, name: str, seed: int, files: Files) -> dict[str, Any] | None:
    """Return what was kept of a seed, or None; a damaged file counts as absent."""
    for path in sorted(folder.glob(f"{name}-{seed}-*.json")):
        try:
            found = json.loads(path.read_text())
            told = {"figures": dict(found["figures"]), "seconds": float(found["seconds"])}
            code = dict(found["code"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if code and all(digest(files, key) == own for key, own in code.items()):
            return told
    return None


def keep(folder: Path, name: str, seed: int, found: Mapping[str, Any], files: Files) -> None:
    """Write the figures of a seed, and what has been loaded by now.

    `files` is the snapshot of before. If what was loaded has changed since, nobody knows what
    measured the figures, and nothing is written. Raises OutputError.
    """
    loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    now = snapshot()
    code = {key: digest(files, key) for key in keys(file for file in loaded if file)}
    if any(digest(now, key) != own for key, own in code.items()):
        return
    with whole_file(folder / f"{name}-{seed}-{_hash(code)}.json", parents=True) as part:
        part.write_text(json.dumps({**found, "code": code}, indent=1) + "\n")

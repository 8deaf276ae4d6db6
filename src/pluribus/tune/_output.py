"""Where a tuning run's folder goes: what is wrong with it is said before the work, not after it."""

import os
import shutil
from pathlib import Path

from pluribus.core.errors import OutputError
from pluribus.core.pool import Pool
from pluribus.engine.driver import target_of
from pluribus.engine.sink import check_parent


def check(out: Path, overwrite: bool = False) -> Path:
    """Return where a run's folder goes, or raise OutputError: before the work, not after it.

    With `overwrite` a folder that pluribus wrote, or an empty one, is replaced, and nothing else.
    """
    out = target_of(out)
    check_parent(out)
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"{out.parent}: may not be written into; choose another folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; name a folder for the model")
    if out.name.endswith(".safetensors"):
        raise OutputError(f"{out}: name a folder; what was learned stands beside the model in it")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another output, or give --overwrite")
    if out.exists() and any(out.iterdir()) and not (out / "pluribus.json").is_file():
        raise OutputError(
            f"{out}: holds other things than an output of pluribus, which --overwrite would "
            "remove; choose another output"
        )
    return out


def check_room(out: Path, pool: Pool) -> None:
    """Raise OutputError if the output would replace a model of the pool, or if the disk is full.

    Both would only be seen when the tuning is done.
    """
    for label, weights in {"base": pool.base, **pool.experts}.items():
        folder = None if weights is None else weights.folder
        if folder is not None and out.exists() and Path(folder).resolve() == out.resolve():
            raise OutputError(f"{out}: {label} is read from there; choose another output")
    wanted = sum(spec.nbytes for spec in next(iter(pool.experts.values())).spec.values())
    free = shutil.disk_usage(out.parent).free
    if wanted > free:
        raise OutputError(
            f"{out}: the model needs {wanted / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free "
            "there; free some space or choose another disk"
        )

"""Write a zoo as checkpoints that any command can read.

    OUT/base.safetensors
    OUT/experts/TASK.safetensors       the same names and shapes
    OUT/heads/TASK.safetensors         weight (v, d), bias (v,)
    OUT/zoo.json                       name, seed, accuracy of base and specialists by task

All of it is written into OUT.partial and takes its name when it is whole. A zoo that stood there is
moved to OUT.replaced first and removed last.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from pluribus.core.errors import OutputError, listing
from pluribus.tasks.zoo import Zoo

RECORD = "zoo.json"


def check(out: Path, overwrite: bool) -> Path:
    """Return the folder to write, or raise OutputError: before the work, not after it.

    A new or an empty folder will do; with `overwrite`, also one that this module wrote, if nothing
    was put into it since.
    """
    out = out.expanduser().absolute()
    if not out.parent.is_dir():
        raise OutputError(f"{out}: no such folder to write into, {out.parent}; create it")
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"{out.parent}: may not be written into; choose another folder")
    for place in (out, _beside(out, "partial"), _beside(out, "replaced")):
        if place.exists() and not place.is_dir():
            raise OutputError(f"{place}: is a file; name a folder for the zoo")
        if place.is_dir() and any(place.iterdir()) and not (place / RECORD).is_file():
            raise OutputError(f"{place}: holds other things than a zoo; choose another folder")
        if place.is_dir() and (others := _others(place)):
            raise OutputError(
                f"{place}: holds {listing(others)} beside the zoo, which would be lost; move that, "
                "or choose another folder"
            )
    if (out / RECORD).is_file() and not overwrite:
        raise OutputError(
            f"{out}: holds a zoo already; choose another folder, or pass --overwrite to replace it"
        )
    return out


def export(zoo: Zoo, out: Path, told: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write base, experts, heads, and `told` as the record. Raises OutputError."""
    out = check(out, overwrite)
    stage, old = _beside(out, "partial"), _beside(out, "replaced")
    try:
        for place in (stage, old):  # left by a run that was killed
            if place.exists():
                shutil.rmtree(place)
        stage.mkdir()
        (stage / RECORD).write_text(json.dumps(told, indent=1) + "\n", "utf-8")
        save_file(zoo.base, stage / "base.safetensors")
        for folder, states in (("experts", zoo.experts), ("heads", zoo.heads)):
            (stage / folder).mkdir()
            for task, state in states.items():
                save_file(state, stage / folder / f"{task}.safetensors")
        if out.exists():
            os.replace(out, old)
        os.replace(stage, out)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{out}: cannot be written ({why})") from None
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for place in (stage, old):
            shutil.rmtree(place, ignore_errors=True)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")


def _others(folder: Path) -> list[str]:
    """Return what is in a zoo's folder and was not written by `export`."""
    ours = (RECORD, "base.safetensors", "experts/*.safetensors", "heads/*.safetensors")
    known = {path for pattern in ours for path in folder.glob(pattern)}
    known |= {folder / "experts", folder / "heads"}
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p not in known)

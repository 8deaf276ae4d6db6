"""A transfer as a folder: written whole or not at all.

report.json            what was done, all methods' figures, who contributed
adapter.safetensors    the target's one adapter (of methods that come to one)
head.safetensors       weight (v, d), bias (v,)
transfer.safetensors   what was learned: `pluribus.route.transfer.load` reads it
sources/NAME.safetensors    adapters that this run trained, for the next recipe
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pluribus import __version__, report
from pluribus.core.errors import OutputError
from pluribus.core.whole import whole_folder
from pluribus.engine.sink import check_parent
from pluribus.route.transfer._fit import Score
from pluribus.route.transfer._mix import Fused
from pluribus.route.transfer._recipe import Ran, TransferRecipe

REPORT = "report.json"
FORM = "pluribus transfer"


def check(folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Return where a transfer may be written, or raise OutputError: before the work."""
    out = Path(folder).expanduser().absolute()
    check_parent(out)
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"{out.parent}: may not be written into; choose another folder")
    if out.exists():
        if not _ours(out):
            raise OutputError(f"{out}: exists and is no transfer; choose another name")
        if not overwrite:
            raise OutputError(
                f"{out}: exists already; choose another name, or pass --overwrite to replace it"
            )
    return out


def check_sources(out: Path, recipe: TransferRecipe) -> None:
    """Raise OutputError if writing `out` would remove an adapter that the recipe reads."""
    for source in recipe.sources:
        if source.adapter is None:
            continue
        place = Path(recipe.place(source.adapter)).expanduser().absolute()
        if place.resolve().is_relative_to(out.resolve()):
            raise OutputError(
                f"{out}: source {source.name} is read from there, and would be lost; choose "
                "another folder"
            )


def told(ran: Ran, recipe: TransferRecipe) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "format": FORM,
        "pluribus": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "classes": list(ran.classes),
        "rows": ran.rows,
        "methods": {name: result.report() for name, result in ran.results.items()},
    }


def text(ran: Ran) -> str:
    """Return the tables for a terminal: methods, and who contributed to the first of them."""

    def share(score: Score | None) -> float | None:
        return None if score is None else score.accuracy

    rows = [
        [name, one.numbers, share(one.val), share(one.test), one.step]
        for name, one in ran.results.items()
    ]
    shown = report.aligned(
        ["method", "numbers trained", "validation", "test", "step kept"],
        rows,
        {"validation": ".1%", "test": ".1%", "numbers trained": ",d"},
    )
    shares = next(iter(ran.results.values())).contributions()
    if not shares:
        return shown
    means = {name: sum(found.values()) / len(found) for name, found in shares.items()}
    body = [
        [name, means[name], *shares[name].values()]
        for name in sorted(means, key=lambda name: -means[name])
    ]
    layers = [str(i) for i in range(len(next(iter(shares.values()))))]
    columns = ["mean", *(f"layer {i}" for i in layers)]
    return f"{shown}\n\n" + report.aligned(
        ["source", *columns], body, dict.fromkeys(columns, "+.3f")
    )


def save(ran: Ran, recipe: TransferRecipe, folder: Path, *, overwrite: bool = False) -> None:
    """Write the folder. Raises OutputError; what stood there stays until the new one is whole."""
    out = check(folder, overwrite)
    first = next(iter(ran.results.values()))
    with whole_folder(out) as stage:
        if not isinstance(first.mixer, Fused):
            first.export().save(stage / "adapter.safetensors", ran.model)
        save_file(
            {n: t.cpu().contiguous() for n, t in first.head.items()}, stage / "head.safetensors"
        )
        first.save(stage / "transfer.safetensors")
        for name in ran.trained:
            ran.sources[name].save(stage / "sources" / f"{name}.safetensors", ran.model)
        (stage / REPORT).write_text(json.dumps(told(ran, recipe), indent=1) + "\n", "utf-8")


def _ours(folder: Path) -> bool:
    try:
        return json.loads((folder / REPORT).read_bytes())["format"] == FORM
    except (OSError, ValueError, KeyError, TypeError):
        return False

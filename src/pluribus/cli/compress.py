"""`pluribus compress` and `pluribus expand`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, gigabytes, progress, show_json


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(compress)
    app.command()(expand)


def compress(
    recipe: Annotated[
        Path, typer.Argument(help="YAML: method, parameters, base_model, experts {task: model}.")
    ],
    store: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep many experts as one shared part and a little for each.

    Example: pluribus compress examples/recipes/bank.yml bank/
    """
    from pluribus import compress as stores
    from pluribus.compress import _recipe

    asked = _recipe.load(recipe)
    with progress(f"merging the shared part of {store}", quiet) as bar:
        made = stores.build(
            asked.what, asked.base, asked.experts, store, overwrite=overwrite, on_progress=bar
        )
    _show(store, made.report(), as_json)


def expand(
    store: Annotated[Path, typer.Argument(help="A store written by pluribus compress.")],
    task: Annotated[str | None, typer.Argument(help="Whose expert; none lists them.")] = None,
    out: Annotated[Path | None, typer.Argument(help="File or folder to write.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if it has moved.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one expert of a store as an ordinary checkpoint, or list what a store holds.

    Example: pluribus expand bank/ math math.safetensors
    """
    from pluribus import compress as stores
    from pluribus.core.errors import InputError, nearest
    from pluribus.engine.driver import copy

    found = stores.open_store(store, base)
    if task is None:
        _show(store, found.report(), as_json)
        return
    if task not in found.tasks:
        raise InputError(
            f"{store} has no task {task!r}; it has: {', '.join(found.tasks)}."
            + nearest(task, found.tasks)
        )
    if out is None:
        raise InputError("name the output: pluribus expand STORE TASK OUT")
    with progress(f"writing {out}", quiet) as bar:
        result = copy(found.expand(task), out, overwrite=overwrite, on_progress=bar)
    if as_json:
        show_json(
            {
                "out": str(out),
                "task": task,
                "seconds": round(result.seconds, 3),
                "bytes_written": result.bytes_written,
            }
        )
    else:
        how = "complete already" if not result.bytes_written else f"{result.seconds:.1f} s"
        print(f"{out}: {task}, {gigabytes(result.weights.nbytes)} in {how}")


def _show(store: Path, report: dict[str, Any], as_json: bool) -> None:
    from pluribus.report import aligned

    if as_json:
        show_json({"store": str(store), **report})
        return
    rows = [
        (task, gigabytes(told["bytes"]), gigabytes(told["checkpoint_bytes"]))
        for task, told in report["tasks"].items()
    ]
    print(aligned(["task", "kept", "checkpoint"], rows))
    print(f"{store}: {report['ratio']:.1%} of the checkpoints, base included")

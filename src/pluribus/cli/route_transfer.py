"""`pluribus route transfer`: a target with few labels, helped by other tasks' adapters."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, show_json, steps


def register(app: typer.Typer) -> None:
    """Add the command to those of `pluribus route`, which is registered before."""
    group = next(group for group in app.registered_groups if group.name == "route")
    assert group.typer_instance is not None
    group.typer_instance.command()(transfer)


def transfer(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: encoder, sources, target, method.")],
    out: Annotated[Path, typer.Argument(help="Folder to write adapter, head and report to.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn a task with few labels by scaling the adapters of other tasks.

    The encoder and the sources stay frozen; what is learned (ScaLearn) comes to one ordinary
    adapter. Sources without an adapter are trained first, and kept in OUT/sources. Contributions
    are the mean scale of each source.

    Example: pluribus route transfer examples/route/transfer.yml transferred/
    """
    from pluribus.route.transfer import _output as output
    from pluribus.route.transfer import _recipe as recipes

    out = output.check(out, overwrite)
    loaded = recipes.load(recipe)
    output.check_sources(out, loaded)
    if device is not None:
        loaded = loaded.on(device)
    ran = recipes.run(loaded, steps(quiet))
    output.save(ran, loaded, out, overwrite=overwrite)
    if as_json:
        show_json({"out": str(out), **output.told(ran, loaded)})
        return
    print(output.text(ran))
    print(f"{out}: learned from {ran.rows['train']} labelled rows of {len(ran.classes)} classes")

"""`pluribus zoo`: a base and its specialists, trained once and kept."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, show_json, steps


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(zoo)


def zoo(
    name: Annotated[str | None, typer.Argument(help="Which; without it, all are listed.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    sizes: Annotated[
        list[str] | None, typer.Option(help="A parameter of the zoo, KEY=VALUE; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for base, experts and heads as checkpoints.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a base and one specialist a task, or find them in the cache; show how good they are.

    Example: pluribus zoo vision6 --seed 1 --sizes steps=100 --out specialists
    """
    from pluribus.core.errors import InputError
    from pluribus.report import aligned
    from pluribus.tasks import export
    from pluribus.tasks import zoo as zoos

    if name is None:
        if sizes or out:
            raise InputError(f"name a zoo to build: {', '.join(zoos.names())}")
        found = {known: zoos.summary(known) for known in zoos.names()}
        if as_json:
            show_json([{"name": known, "about": about} for known, about in found.items()])
        else:
            print(aligned(["zoo", "about"], list(found.items())))
        return
    given = zoos.parsed(name, sizes or [])
    if out is not None:
        export.check(out, overwrite)
    told = _built(name, seed, given, out, overwrite, steps(quiet))
    if as_json:
        show_json(told)
        return
    rows = [(task, *row.values()) for task, row in told["tasks"].items()]
    rows.append(("mean", None, None, None, told["base"], told["specialists"]))
    header = ["task", "classes", "train", "test", "base", "specialist"]
    print(aligned(header, rows, {"base": ".1%", "specialist": ".1%"}))
    how = "trained" if told["trained"] else "from the cache"
    size = f"{told['parameters'] / 1e6:.2f} M parameters"
    print(f"{told['zoo']}, seed {seed}: {size} each, {how} in {told['seconds']:.0f} s")
    if out is not None:
        print(f"{out}: base.safetensors, experts, heads")


def _built(
    name: str, seed: int, given: dict[str, Any], out: Path | None, overwrite: bool, on_step: Any
) -> dict[str, Any]:
    from pluribus.tasks import export
    from pluribus.tasks import zoo as zoos

    trained = False

    def count(stage: str, done: int, total: int) -> None:
        nonlocal trained
        trained = True
        if on_step is not None:
            on_step(stage, done, total)

    start = time.perf_counter()
    made = zoos.build(name, seed, on_step=count, **given)
    seconds = time.perf_counter() - start
    told = {"trained": trained, "seconds": round(seconds, 1), **made.described(), "sizes": given}
    if out is not None:
        export.export(made, out, told, overwrite=overwrite)
        told["out"] = str(out)
    return told

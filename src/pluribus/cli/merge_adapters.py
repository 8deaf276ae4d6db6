"""`pluribus merge-adapters`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, show_json, steps


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge-adapters")(merge_adapters)


def merge_adapters(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders of one base.")],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter to write.")],
    method: Annotated[
        str, typer.Option(help="As in a recipe, such as linear or 'ties(density=0.2)'.")
    ] = "linear",
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="Factor of an update under linear; one an adapter."),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="How a linear sum is written: svd, cat (exact) or linear.")
    ] = "svd",
    rank: Annotated[
        int | None, typer.Option(help="The most that a module gets; default: as its adapters.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each update to reach, if fewer ranks do.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Element type of the adapter.")] = "float32",
    base_model: Annotated[
        str | None, typer.Option(help="The base that all fit, if they name different ones.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For methods that draw random numbers.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge LoRA adapters into one, without their base.

    Example: pluribus merge-adapters math/ code/ both/ --method ties --rank 16
    """
    from pluribus.adapters import merge_adapters as combine

    choice: Any = mode
    report = combine(
        adapters,
        out,
        method,
        weights=weight or None,
        mode=choice,
        rank=rank,
        energy=energy,
        dtype=dtype,
        base_model=base_model,
        seed=seed,
        overwrite=overwrite,
        on_step=steps(quiet),
    )
    if as_json:
        show_json({"out": str(out), "adapters": [str(one) for one in adapters], **report.to_dict()})
        return
    held = report.only("lora")
    worst = min(held, key=lambda module: module.kept, default=None)
    told = f"{out}: {len(held)} modules"
    if worst is not None:
        ranks = sorted(module.rank for module in held)
        told += (
            f" of rank {ranks[0]} to {ranks[-1]}; {report.kept:.2%} of the merged update's energy "
            f"kept, worst {worst.kept:.2%} ({worst.name})"
        )
    print(told)

"""`pluribus extract-lora`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, show_json, steps, warn


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("extract-lora")(extract_lora)


def extract_lora(
    model: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    base: Annotated[str, typer.Argument(help="The model it was tuned from.")],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter to write.")],
    rank: Annotated[int, typer.Option(help="The most that a module gets.")] = 128,
    energy: Annotated[
        float | None, typer.Option(help="Share of each update to reach, if fewer ranks do.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", "-i", help="Only modules that match; repeat.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", "-e", help="Leave out what matches; repeat.")
    ] = None,
    embed: Annotated[
        str, typer.Option(help="Embeddings: save (whole), lora (factored) or skip.")
    ] = "save",
    save_module: Annotated[
        list[str] | None, typer.Option("--save-module", help="Save it whole; repeat.")
    ] = None,
    distribute_scale: Annotated[
        bool, typer.Option(help="Give both factors the roots of the singular values.")
    ] = True,
    sv_epsilon: Annotated[float, typer.Option(help="Least singular value to keep.")] = 0.0,
    skip_undecomposable: Annotated[
        bool, typer.Option("--skip-undecomposable", help="Leave norms and biases as in the base.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Element type of the adapter.")] = "float32",
    base_model: Annotated[
        str | None, typer.Option(help="Name of the base in the adapter's configuration.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the difference of two models as a LoRA adapter, and measure what it holds.

    Example: pluribus extract-lora tuned/ base/ adapter/ --rank 32
    """
    from pluribus.adapters import extract_lora as extract
    from pluribus.core.errors import listing

    choice: Any = embed
    report = extract(
        base,
        model,
        out,
        rank=rank,
        energy=energy,
        include=include or (),
        exclude=exclude or (),
        embed=choice,
        save_modules=save_module or (),
        distribute_scale=distribute_scale,
        sv_epsilon=sv_epsilon,
        skip_undecomposable=skip_undecomposable,
        dtype=dtype,
        base_model=base_model,
        overwrite=overwrite,
        on_step=steps(quiet),
    )
    left = report.only("skipped")
    if left:
        names = listing(module.name for module in left)
        warn(f"{len(left)} tensor(s) changed but are not in the adapter: {names}")
    if as_json:
        show_json({"out": str(out), **report.to_dict()})
        return
    factored, saved = report.only("lora"), report.only("saved")
    worst = min(factored, key=lambda module: module.kept)
    ranks = sorted(module.rank for module in factored)
    print(
        f"{out}: {len(factored)} modules of rank {ranks[0]} to {ranks[-1]}, "
        f"{len(saved)} tensors saved whole"
    )
    print(
        f"read back: {report.kept:.2%} of the update's energy kept, worst {worst.kept:.2%} "
        f"({worst.name}); largest error of a weight {report.max_error:.3g}"
    )

"""`pluribus tokensurgeon`."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import (
    Json,
    Memory,
    Overwrite,
    Quiet,
    Threads,
    gigabytes,
    progress,
    show_json,
    steps,
    warn,
)

WHERE = "no, embed, lm_head or yes: in which matrices."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tokensurgeon)


def tokensurgeon(
    model: Annotated[str, typer.Argument(help="The model that gets another tokenizer.")],
    donor: Annotated[str, typer.Argument(help="The model whose tokenizer it gets.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            help="For tokens that the model lacks: omp, common_interpolation, subword, mean, zero, "
            "randn, john_hewitt."
        ),
    ] = "omp",
    k: Annotated[int, typer.Option("--k", "-k", help="Common tokens that a row combines.")] = 64,
    cosine: Annotated[
        bool, typer.Option("--cosine", help="common_interpolation: neighbours by cosine.")
    ] = False,
    weighting: Annotated[
        str,
        typer.Option(
            help="common_interpolation: distance_proportional, barycentric or least_squares."
        ),
    ] = "distance_proportional",
    subword: Annotated[
        str, typer.Option(help="subword: mean, sum, weighted_mean or first_last.")
    ] = "mean",
    byte_match: Annotated[
        str, typer.Option(help=f"Take the row of the same byte written otherwise: {WHERE}")
    ] = "no",
    prefix_match: Annotated[
        str, typer.Option(help=f"Take the row of the longest prefix: {WHERE}")
    ] = "no",
    pad_to_multiple_of: Annotated[
        int | None, typer.Option(help="Round the number of rows up.", min=0)
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of noise added to new rows.")
    ] = 0.0,
    scale: Annotated[float, typer.Option(help="Factor of new rows, noise included.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For noise, randn and john_hewitt.")] = 0,
    memory: Memory = "512MB",
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="Where rows are fitted: cpu, cuda, cuda:N.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the output.")] = "5GB",
    resume: Annotated[bool, typer.Option(help="Go on where a killed run stopped.")] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a model the tokenizer of another one, without training.

    Example: pluribus tokensurgeon model/ donor/ out/ --method omp --k 64
    """
    from pluribus.engine.driver import Options, size_of
    from pluribus.surgery import transplant

    options = Options(
        threads=threads,
        memory=size_of(memory),
        max_shard_size=size_of(max_shard_size),
        overwrite=overwrite,
        resume=resume,
    )
    with ExitStack() as stack:
        bars: list[Callable[[Any], None] | None] = []

        def writing(now: Any) -> None:
            """Show the bar from the first byte on: until then `steps` has the line."""
            if not bars:
                bars.append(stack.enter_context(progress(f"writing {out}", quiet)))
            if bars[0] is not None:
                bars[0](now)

        result, report = transplant(
            model,
            donor,
            out,
            options=options,
            device=device,
            on_step=steps(quiet),
            on_progress=writing,
            method=method,
            k=k,
            cosine=cosine,
            weighting=weighting,
            subword=subword,
            byte_match=byte_match,
            prefix_match=prefix_match,
            pad_to_multiple_of=pad_to_multiple_of,
            noise=noise,
            scale=scale,
            seed=seed,
        )
    for note in dict.fromkeys((*report.warnings, *result.warnings)):
        warn(note)
    if as_json:
        show_json(
            {
                "out": str(out),
                "seconds": round(result.seconds, 3),
                "bytes_written": result.bytes_written,
                "resumed": result.resumed,
                **report.to_dict(),
            }
        )
        return
    for one in report.matrices:
        found = one.copied + one.by_byte + one.by_prefix
        told = f"{one.name}: {found} rows kept, {one.approximated} made by {method}"
        if one.mean_error is not None:
            told += (
                f"; relative error in the donor's space {one.mean_error:.3g} on average, "
                f"{one.worst_error:.3g} at worst ({one.worst_token!r})"
            )
        print(told)
    how = "complete already" if not result.bytes_written else gigabytes(result.weights.nbytes)
    print(f"{out}: {report.rows_before} rows before, {report.rows} now; {how}")

"""`pluribus merge` and `pluribus verify`."""

from pathlib import Path
from typing import Annotated

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
    warn,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(merge)
    app.command()(verify)


def merge(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; mergekit's run unchanged.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder, or one .safetensors file, to write.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, time and memory, and write nothing.")
    ] = False,
    memory: Memory = "512MB",
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    ray: Annotated[bool, typer.Option("--ray", help="Spread the work over a Ray cluster.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the output.")] = "5GB",
    resume: Annotated[bool, typer.Option(help="Go on where a killed run stopped.")] = True,
    overwrite: Overwrite = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Read the output back and check it.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity in inputs.")
    ] = False,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Warn about unknown recipe keys only.")
    ] = False,
    allow_crimes: Annotated[
        bool, typer.Option("--allow-crimes", help="Merge different architectures.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models by a recipe.

    Example: pluribus merge examples/recipes/ties.yml merged/ --memory 512MB
    """
    from pluribus import recipe as recipes
    from pluribus.core.errors import InputError
    from pluribus.engine.driver import Options, size_of

    loaded = recipes.load(recipe, lenient=lenient)
    options = Options(
        threads=threads,
        memory=size_of(memory),
        max_shard_size=size_of(max_shard_size),
        device=device,
        ray=ray,
        overwrite=overwrite,
        resume=resume,
        allow_nonfinite=allow_nonfinite,
    )
    if dry_run:
        told = recipes.dry_run(loaded, options, allow_crimes=allow_crimes)
        show_json(told) if as_json else print(recipes.dry_run_text(told))
        return
    if out is None:
        raise InputError(
            "name the output: pluribus merge RECIPE OUT (or --dry-run to see the plan)"
        )
    with progress(f"merging into {out}", quiet) as bar:
        result = recipes.run(loaded, out, options, on_progress=bar, allow_crimes=allow_crimes)
    for note in result.warnings:
        warn(note)
    faults = _faults(out, quiet) if check else []
    if as_json:
        show_json(
            {
                "out": str(out),
                "seconds": round(result.seconds, 3),
                "bytes_read": result.bytes_read,
                "bytes_written": result.bytes_written,
                "resumed": result.resumed,
                "warnings": list(result.warnings),
                "verified": not faults if check else None,
            }
        )
    else:
        how = "complete already" if not result.bytes_written else f"{result.seconds:.1f} s"
        rate = result.bytes_read / max(result.seconds, 1e-9)
        print(
            f"{out}: {gigabytes(result.weights.nbytes)} in {how}"
            + (f", read at {gigabytes(rate)}/s" if result.bytes_read else "")
            + (", resumed" if result.resumed and result.bytes_written else "")
            + (", verified" if check and not faults else "")
        )
    _raise_faults(out, faults)


def verify(
    path: Annotated[Path, typer.Argument(help="An output of pluribus merge.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a merged model against the digests written with it.

    Example: pluribus verify merged/
    """
    faults = _faults(path, quiet)
    if as_json:
        show_json({"path": str(path), "faults": dict(faults)})
    elif not faults:
        print(f"{path}: every tensor is as it was written")
    _raise_faults(path, faults)


def _faults(path: Path, quiet: bool) -> list[tuple[str, str]]:
    from pluribus.engine import provenance

    with progress(f"verifying {path}", quiet) as bar:
        return list(provenance.verify(path, bar))


def _raise_faults(path: Path, faults: list[tuple[str, str]]) -> None:
    from pluribus.core.errors import FormatError, listing

    if faults:
        told = listing(f"{name} {fault}" for name, fault in faults)
        raise FormatError(f"{path}: {len(faults)} tensor(s) are not as written: {told}")

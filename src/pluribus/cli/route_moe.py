"""`pluribus route moe`: mixtures of experts that transformers loads."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from pluribus.cli._common import (
    Json,
    Overwrite,
    Quiet,
    check_page,
    gigabytes,
    progress,
    show_json,
    steps,
    warn,
)


def register(app: typer.Typer) -> None:
    """Add the command to those of `pluribus route`, which is registered before."""
    group = next(group for group in app.registered_groups if group.name == "route")
    assert group.typer_instance is not None
    group.typer_instance.command()(moe)


def moe(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with a base and experts.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the mixture to.")],
    html: Annotated[
        Path | None, typer.Option(help="Also write a page: which expert takes whose tokens.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of the output.")] = "5GB",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Assemble dense models into a mixture of experts that transformers loads.

    Attention, norms and embeddings are the base's; each expert gives its feed-forward blocks; gates
    come of prompts, of chance, or of texts of each expert. Recipes of mergekit-moe run unchanged.

    Example: pluribus route moe examples/route/moe.yml mixture/ --html routes.html
    """
    from pluribus.core.errors import InputError
    from pluribus.engine.driver import Options, size_of
    from pluribus.route.moe import assemble, load, routes
    from pluribus.route.moe.assemble import texts_of

    check_page(html)
    loaded = load(recipe)
    if html is not None and not any(entry.data for entry in loaded.experts):
        raise InputError("--html shows where texts go; give experts data: files of texts")
    options = Options(max_shard_size=size_of(max_shard_size), overwrite=overwrite)
    with ExitStack() as stack:
        bars: list[Callable[[Any], None] | None] = []

        def writing(now: Any) -> None:
            """Show the bar from the first byte on: until then `steps` has the line."""
            if not bars:
                bars.append(stack.enter_context(progress(f"writing {out}", quiet)))
            if bars[0] is not None:
                bars[0](now)

        report = assemble(
            loaded,
            out,
            options=options,
            device=device or "cpu",
            on_step=steps(quiet),
            on_progress=writing,
        )
    told = report.to_dict()
    for note in dict.fromkeys(report.warnings):
        warn(note)
    rows = _about(told)
    if html is not None:
        from pluribus import report as pages

        names = [entry["name"] for entry in told["experts"]]
        texts = texts_of(loaded, names)
        found = routes(out, texts, names, device=device or "cpu", on_step=steps(quiet))
        told["routes"] = found.to_dict()
        pages.save(html, found.html(f"Mixture {out.name}", rows))
    if as_json:
        show_json(told)
        return
    _print(told, rows)


def _about(told: Mapping[str, Any]) -> list[list[Any]]:
    """Return what a mixture is, a row a fact."""
    conditions = told["conditions"]
    rows = [
        ["architecture", f"{told['architecture']} ({told['model']})"],
        ["experts a token", f"{told['experts_per_token']} of {len(told['experts'])}"],
        ["gates", told["gate_mode"]],
        [
            "condition number of gates",
            f"{min(conditions):.3g} to {max(conditions):.3g} over {told['layers']} layers",
        ],
        ["numbers", f"{told['total'] / 1e6:.4g} M, {told['active'] / 1e6:.4g} M active a token"],
    ]
    trained = told["training"]
    if trained is not None:
        right, loss = trained["accuracy"], trained["loss"]
        rows.append(
            [
                "held-out tokens to their own expert",
                f"{sum(right) / len(right):.1%} on average, {min(right):.1%} at worst "
                f"(cross-entropy {sum(loss) / len(loss):.3f} nats)",
            ]
        )
        if trained["before"] is not None:
            rows.append(
                [
                    "held-out loss of the mixture",
                    f"{trained['before']:.4f} before, {trained['after']:.4f} after training it "
                    "(nats a token)",
                ]
            )
    return rows


def _print(told: Mapping[str, Any], rows: list[list[Any]]) -> None:
    from pluribus import report

    header = ["expert", "from", "prompts", "data", "noise", "factor"]
    table = [
        [
            name,
            entry["source"],
            f"{entry['positive_prompts']}+/{entry['negative_prompts']}-",
            entry["data"] or "-",
            f"{entry['noise_scale']:g}",
            f"{entry['residual_scale']:g}",
        ]
        for name, entry in (
            *((entry["name"], entry) for entry in told["experts"]),
            *((f"{entry['name']} (shared)", entry) for entry in told["shared"]),
        )
    ]
    print(report.aligned(header, table, {}))
    for name, value in rows:
        print(f"{name}: {value}")
    print(f"{told['out']}: {gigabytes(told['bytes_written'])} written")

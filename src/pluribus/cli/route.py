"""`pluribus route`: composites that are routed per input."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, gigabytes, show_json, steps

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")]


def register(app: typer.Typer) -> None:
    """Add the command and its own."""
    own = typer.Typer(
        help="One base, many small parts, and a router that mixes them for each input.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    own.command()(build)
    own.command()(explain)
    app.add_typer(own, name="route")


def build(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe with parts and a router.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the composite to.")],
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a composite of a base and its experts, and fit its router.

    Low-rank parts hold what each expert adds to a merge of all; masks share one vector; adapters
    are PEFT's. `pluribus eval OUT` scores it, `pluribus route explain OUT` shows who is chosen.

    Example: pluribus route build examples/route/demo8.yml composite/
    """
    from dataclasses import asdict

    from pluribus.route import recipe as recipes
    from pluribus.route import store

    out = store.check(out, overwrite)
    loaded = recipes.load(recipe)
    if device is not None:
        loaded = loaded.model_copy(update={"device": device})
    made = recipes.build(loaded, steps(quiet))
    store.save(made.routed, out, overwrite=overwrite, tokenizer=made.tokenizer, origin=made.origin)
    told = {"out": str(out), **made.routed.report()}
    told.pop("forms")
    told["router"] = asdict(made.report) if made.report is not None else None
    if as_json:
        show_json(told)
        return
    print(f"{out}: {len(told['parts'])} parts: {', '.join(told['parts'])}")
    print(f"base {gigabytes(told['base_bytes'])}, all parts {gigabytes(told['parts_bytes'])}")
    if told["run_apart"]:
        print(f"rows are run apart for: {', '.join(told['run_apart'])}")
    if made.report is not None:
        kept = f", epoch {made.report.epoch} kept" if made.report.epoch else ""
        print(
            f"router: {made.report.accuracy:.1%} of held-out inputs to their own part, "
            f"entropy {made.report.entropy:.2f} nats, calibration error "
            f"{made.report.calibration:.1%}{kept}"
        )


def explain(
    composite: Annotated[Path, typer.Argument(help="Folder that `route build` wrote.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Files of texts, one a line; of a zoo, its tasks (default: all)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Inputs of each, at most.", min=1)] = 200,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.")] = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which parts a composite chooses for which inputs, and how sure it is.

    Example: pluribus route explain composite/ maths.txt code.txt --html routes.html
    """
    from pluribus import report
    from pluribus.cli._common import check_page
    from pluribus.route import explain as explained

    check_page(html)
    found = explained.of_folder(composite, inputs or [], limit, device or "cpu", steps(quiet))
    if html is not None:
        report.save(html, found.html(f"Routes of {composite.name}"))
    if as_json:
        show_json(found.to_dict())
        return
    print(found.text())

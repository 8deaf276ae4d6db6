"""`pluribus circuits`: which attention heads a model uses for a task, and do tasks share them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pluribus.cli._common import Json, Quiet, check_page, show_json, steps, warn

if TYPE_CHECKING:
    from pluribus.inspect.circuits import HeadModel, Prompts, PromptTask

Model = Annotated[str, typer.Argument(help="A model folder, BASE+ADAPTER or hub name.")]
Task = Annotated[str, typer.Argument(help="A task; `pluribus circuits tasks` lists them.")]
Count = Annotated[int, typer.Option("--prompts", help="Prompts to draw.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the prompts.", min=0)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
SHOWN = 56


def register(app: typer.Typer) -> None:
    """Add the command."""
    group = typer.Typer(
        help="Which attention heads a model uses for a task, and do tasks share them.",
        no_args_is_help=True,
    )
    group.command()(tasks)
    group.command()(discover)
    group.command()(overlap)
    group.command()(ablate)
    group.command()(repair)
    app.add_typer(group, name="circuits")


def tasks(as_json: Json = False) -> None:
    """List the tasks, each with a prompt.

    Example: pluribus circuits tasks
    """
    from pluribus.inspect.circuits.tasks import TASKS
    from pluribus.report import aligned

    shown = {task.name: (task.about, task.generate(0, 1)[0]) for task in TASKS.values()}
    if as_json:
        show_json(
            {
                name: {"about": about, "prompt": one.clean, "answer": one.answer}
                for name, (about, one) in shown.items()
            }
        )
        return
    rows = [
        (name, about, f"… {one.clean.splitlines()[-1][-SHOWN:]}", one.answer.strip())
        for name, (about, one) in shown.items()
    ]
    print(aligned(["task", "what is asked", "a prompt's end", "answer"], rows))


def discover(
    model: Model,
    task: Task,
    prompts: Count = 48,
    seed: Seed = 0,
    top: Annotated[float, typer.Option(help="Share of all heads that a stage keeps.")] = 0.02,
    stages: Annotated[
        int | None, typer.Option(help="How many stages back from the logits.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the circuit, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with its graph.")] = None,
    repair: Annotated[
        Path | None,
        typer.Option(help="Write a repair of colored_objects_natural by its negative movers."),
    ] = None,
    allow_small_gap: Annotated[
        bool, typer.Option("--allow-small-gap", help="Go on where effects are mostly noise.")
    ] = False,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find a task's circuit, backwards from the logits, by path patching.

    Example: pluribus circuits discover ./model ioi --out ioi.json --html ioi.html
    """
    from pluribus import report
    from pluribus.inspect.circuits import discover as find
    from pluribus.inspect.circuits import render

    for path in (out, html, repair):
        check_page(path)
    heads, drawn, known = _opened(model, task, prompts, seed, device)
    found = find(
        heads,
        known,
        drawn,
        stages=known.stages[:stages],
        top_share=top,
        seed=seed,
        model=Path(model).name,
        allow_small_gap=allow_small_gap,
        on_step=steps(quiet),
    )
    for note in found.warnings:
        warn(note)
    if out is not None:
        found.save(out)
    if html is not None:
        report.save(html, render.html(found))
    if repair is not None:
        _write_repair(found, repair)
    if as_json:
        show_json(found.to_dict())
        return
    print(render.terminal(found))
    for path in (out, html, repair):
        if path is not None:
            print(f"\n{path}: written")


def overlap(
    one: Annotated[Path, typer.Argument(help="A circuit that discover wrote.")],
    other: Annotated[Path, typer.Argument(help="Another one of the same model.")],
    stage: Annotated[str | None, typer.Option(help="Compare this stage alone.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two circuits: shared heads, over the smaller one and over the union.

    Example: pluribus circuits overlap ioi.json colored.json
    """
    from pluribus.inspect.circuits import Circuit, render
    from pluribus.inspect.circuits import overlap as compare
    from pluribus.inspect.circuits.circuit import name_of

    circuits = Circuit.load(one), Circuit.load(other)
    found = compare(*circuits, stage)
    if as_json:
        show_json(found._asdict() | {"shared": [name_of(head) for head in found.shared]})
    else:
        print(render.compared(*circuits, found))


def ablate(
    model: Model,
    task: Task,
    heads: Annotated[str, typer.Option(help="LAYER.HEAD with commas, such as 23.3,29.1.")],
    kind: Annotated[
        Literal["zero", "mean", "resample"], typer.Option(help="What takes their place.")
    ] = "mean",
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="At all positions, not at the end alone.")
    ] = False,
    prompts: Count = 48,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take away what some heads add, and see what is left of a task.

    Example: pluribus circuits ablate ./model ioi --heads 23.3,29.1 --kind mean
    """
    from pluribus.inspect.circuits import Endings, evaluate
    from pluribus.inspect.circuits import ablate as without
    from pluribus.inspect.circuits.circuit import head_of

    chosen = [head_of(name) for name in heads.split(",") if name.strip()]
    opened, drawn, _ = _opened(model, task, prompts, seed, device)
    if everywhere:
        scores = {
            "as it is": evaluate(opened, drawn),
            kind: without(opened, drawn, chosen, kind, everywhere=True),
        }
    else:
        endings = Endings(opened, drawn, steps(quiet))
        scores = {"as it is": endings.score(), kind: endings.ablate(chosen, kind)}
    rows = {name: _figures(score) for name, score in scores.items()}
    if as_json:
        show_json(rows)
    else:
        print(_table(rows))


def repair(
    recipe: Annotated[Path, typer.Argument(help="A file that discover --repair wrote.")],
    model: Annotated[
        str | None, typer.Option(help="A model folder; default: the one in the file.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let some heads look at set places, and see how a task goes, beside random heads.

    Example: pluribus circuits repair repair.yml --model ./model
    """
    from pluribus.core.errors import InputError
    from pluribus.inspect.circuits import recipe as repairs

    told = repairs.load(recipe)
    if model is None and told.model is None:
        raise InputError(f"{recipe} names no model; give --model, or add 'model: FOLDER'")
    reference = model if model is not None else told.place(told.model or "")
    heads, drawn, _ = _opened(reference, told.task, told.prompts, told.seed, device)
    done = repairs.apply(told, heads, drawn, steps(quiet))
    if as_json:
        show_json(done.to_dict())
        return
    rows = {"none": _figures(done.none), "repaired": _figures(done.repaired)}
    for number, score in enumerate(done.random):
        rows[f"random {number + 1}"] = _figures(score)
    print(_table(rows))
    print(
        f"\n{len(told.heads)} heads look at {', '.join(told.look_at)}; new mistakes: "
        f"{done.to_dict()['new_mistakes']} of {len(done.none.hits)}"
    )


def _opened(
    model: str, task: str, count: int, seed: int, device: str
) -> "tuple[HeadModel, Prompts, PromptTask]":
    from pluribus.decode.stack import open_reference
    from pluribus.inspect.circuits import HeadModel
    from pluribus.inspect.circuits.tasks import get

    known = get(task)
    opened = open_reference(model, device, "float32")
    return HeadModel(opened.model), known.fitting(opened.tokenizer, seed, count), known


def _write_repair(found: "object", path: Path) -> None:
    """Write the repair of the page: the circuit's negative movers look at the wrong colours."""
    from pluribus.core.errors import InputError
    from pluribus.inspect.circuits import Circuit
    from pluribus.inspect.circuits import recipe as repairs
    from pluribus.inspect.circuits.circuit import name_of

    assert isinstance(found, Circuit)
    negative = found.stages[0].signed("negative")
    if not negative:
        raise InputError(f"no head is in the way of {found.task}, so there is nothing to repair by")
    repairs.save(
        repairs.Repair(
            circuit_repair=1,
            task="colored_objects_natural",
            heads=[name_of(head) for head in negative],
            look_at=["wrong1", "wrong2"],
            prompts=48,
            seed=found.seed,
            random_sets=10,
            note=f"negative movers of {found.task}",
        ),
        path,
    )


def _figures(score: "object") -> dict[str, float | None]:
    from pluribus.inspect.circuits import Score

    assert isinstance(score, Score)
    return {
        "accuracy": score.accuracy,
        "among options": score.among,
        "logit difference": score.mean_difference,
    }


def _table(rows: dict[str, dict[str, float | None]]) -> str:
    from pluribus.report import aligned

    head = ["", "accuracy", "among options", "logit difference"]
    forms = {"accuracy": ".1%", "among options": ".1%", "logit difference": "+.2f"}
    return aligned(head, [(name, *row.values()) for name, row in rows.items()], forms)

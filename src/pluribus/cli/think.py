"""`pluribus think`: whether thinking pays on a task, and a policy of what to use where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, check_page, show_json, steps

if TYPE_CHECKING:
    from pluribus.agents.thinking import Mode, Task


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(think)


def think(
    model: Annotated[
        str,
        typer.Argument(help="A model folder, stack, composite or hub name; or its name there."),
    ],
    task: Annotated[
        list[str],
        typer.Option(help="FILE.jsonl, a task such as gsm8k, or a suite; may be given again."),
    ],
    modes: Annotated[
        str, typer.Option(help="With commas: direct, cot, or strategies; the first is the default.")
    ] = "direct, cot",
    value: Annotated[float, typer.Option(help="What one right answer is worth.")] = 1.0,
    price: Annotated[float, typer.Option(help="What one token costs, in the same unit.")] = 0.0,
    alpha: Annotated[float, typer.Option(help="Chance of a wrong decision, of all tasks.")] = 0.05,
    n_max: Annotated[int, typer.Option(help="Problems of a task, at most.")] = 200,
    max_tokens: Annotated[int, typer.Option(help="Tokens of one thought.", min=1)] = 1024,
    direct_tokens: Annotated[int, typer.Option(help="Tokens of a direct answer.", min=1)] = 10,
    difficulty: Annotated[str, typer.Option(help="Of suites: easy, medium, hard.")] = "medium",
    seed: Annotated[int, typer.Option(help="Of suites and order.", min=0)] = 0,
    extract: Annotated[
        str | None,
        typer.Option(help="How a file's answers are read: final, number, text, ..."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask this endpoint, such as http://localhost:8000/v1.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the policy, as JSON.")] = None,
    overwrite: Overwrite = False,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Element type of a plain model.")] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure whether thinking step by step pays on tasks, and decide for each.

    Example: pluribus think model/ --task grammar --task sums.jsonl --price 0.0001 --out policy.json
    """
    import warnings

    from pluribus import report
    from pluribus.agents import LocalModel, OpenAICompatible
    from pluribus.agents.thinking import CoTPolicy, CoTProbe
    from pluribus.agents.thinking.policy import check_output

    check_page(html)
    if out is not None:
        check_output(out, overwrite)
    tasks = [_task(name, n_max, seed, difficulty, extract) for name in task]
    wanted = _modes(modes, direct_tokens, max_tokens)
    # What can be refused without a model is refused before one is loaded.
    settings = {"value": value, "price": price, "alpha": alpha, "n_max": n_max, "seed": seed}
    probe = CoTProbe(None, wanted, tasks=len(tasks), **settings)
    probe.check(tasks)
    if endpoint is not None:
        probe.model = OpenAICompatible(endpoint, model)
    else:
        probe.model = LocalModel.open(model, device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the table
        policy = CoTPolicy.fit([probe.measure(one, steps(quiet)) for one in tasks])
    if out is not None:
        policy.save(out, overwrite=overwrite)
    if html is not None:
        report.save(html, policy.page(subtitle=model))
    if as_json:
        show_json({"model": model, **policy.to_dict()})
        return
    print(policy.report())
    for path in (out, html):
        if path is not None:
            print(f"\n{path}: written")


def _task(name: str, n_max: int, seed: int, difficulty: str, extract: str | None) -> "Task":
    from pluribus.agents.thinking import Task
    from pluribus.decode.scaling.problems import load
    from pluribus.tasks.suites import SUITES

    if name in SUITES:
        return Task.of_suite(name, n_max, seed, difficulty)
    found = load(name, extract=extract, seed=seed)
    return Task.of(found.name, found.problems)


def _modes(text: str, direct_tokens: int, max_tokens: int) -> list["Mode"]:
    from pluribus.agents.thinking.spelled import modes

    return modes(text, direct_tokens=direct_tokens, max_tokens=max_tokens)

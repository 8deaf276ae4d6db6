"""`pluribus tasks`: the named tasks, where their data is, how a model is asked."""

from typing import Annotated, Any

import typer

from pluribus.cli._common import Json, Quiet, show_json, steps, warn


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tasks)


def tasks(
    names: Annotated[
        list[str] | None, typer.Argument(help="Tasks or groups; all by default.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Read the data and show sizes, classes and a question.")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the sets that are not here, by checksum.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List named tasks and where their data is; show them; fetch their data.

    Example: pluribus tasks text14 --fetch
    """
    from pluribus import report
    from pluribus.core.errors import listing
    from pluribus.tasks import named, runs

    found = named.expand(names) if names else [named.get(name) for name in named.names()]
    if fetch:
        runs.fetch(found, steps(quiet))
    told = [_entry(task, show) for task in found]
    if fetch and (absent := [one["task"] for one in told if one["data"] == "not found"]):
        warn(f"no public source for {listing(absent)}; put the sets into PLURIBUS_DATA by hand")
    if as_json:
        show_json({"tasks": told, "groups": {k: list(v) for k, v in named.groups().items()}})
        return
    if show:
        print("\n\n".join(_text(entry) for entry in told))
        return
    head = ["task", "family", "metric", "data"]
    print(report.aligned(head, [[entry[key] for key in head] for entry in told]))
    if not names:
        for group, members in named.groups().items():
            print(f"\n{group}: {len(members)} tasks, {members[0]} ... {members[-1]}", end="")
        print()


def _entry(task: Any, show: bool) -> dict[str, Any]:
    from pluribus.tasks import sets
    from pluribus.tasks.sources import ORIGINS
    from pluribus.tasks.task import sample

    located = sets.locate(*task.data) if task.data is not None else None
    entry = {
        "task": task.name,
        "family": task.family,
        "metric": task.metric,
        "data": "not found" if located is None else located.place,
    }
    if not show:
        return entry
    examples = task.load()
    row = sample(examples.test, 1, 0)[0]
    origin = ORIGINS.get(task.data[0]) if task.data is not None else None
    return entry | {
        "train": len(examples.train),
        "test": len(examples.test),
        "classes": list(examples.classes),
        "question": task.prompt.ask(row) if task.prompt is not None else None,
        "choices": task.prompt.choices(examples.classes) if task.prompt is not None else [],
        "licence": origin.licence if origin is not None else None,
        "source": [file.url for file in origin.files] if origin is not None else [],
    }


def _text(entry: dict[str, Any]) -> str:
    from pluribus.core.errors import listing

    lines = [
        f"{entry['task']}: {entry['family']}, {entry['metric']}, data from {entry['data']}",
        f"  rows      {entry['train']} train, {entry['test']} test",
    ]
    if entry["classes"]:
        lines.append(f"  classes   {len(entry['classes'])}: {listing(entry['classes'], 8)}")
    if entry["question"] is not None:
        shown = entry["question"].replace("\n", "\n            ")
        lines.append(f"  question  {shown}")
    if entry["choices"]:
        lines.append(f"  choices   {listing([c.strip() for c in entry['choices']], 8)}")
    if entry["licence"]:
        lines.append(f"  licence   {entry['licence']}")
    lines += [f"  source    {url}" for url in entry["source"][:3]]
    return "\n".join(lines)

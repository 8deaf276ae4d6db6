"""`pluribus search`: find a good merge recipe."""

from pathlib import Path
from typing import Annotated

import typer

from pluribus.cli._common import Json, Overwrite, Quiet, check_page, show_json, warn


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(search)


def search(
    space: Annotated[
        Path, typer.Argument(help="YAML recipe with !oneof, !float, ... and an objective.")
    ],
    trials: Annotated[int, typer.Option(help="Trials in all, stored ones included.", min=1)] = 60,
    algorithm: Annotated[
        str, typer.Option(help="random, sweep, evolution, hill, nsga2, cma or tpe.")
    ] = "evolution",
    store: Annotated[
        Path | None, typer.Option(help="SQLite file for the trials; the search goes on from it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from a store that exists.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Write the best recipe, for pluribus merge.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the front.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the algorithm and the trials.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Processes that run trials.", min=1)] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run trials on a Ray cluster.")] = False,
    budget: Annotated[
        float | None, typer.Option(help="Begin no trial after so many seconds.")
    ] = None,
    top: Annotated[int, typer.Option(help="Rows of the table.", min=1)] = 10,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search a space of merge recipes for the best score.

    Example: pluribus search examples/search/demo8.yml --store study.sqlite --out best.yml
    """
    from pluribus.core.errors import InputError, OutputError
    from pluribus.report import save
    from pluribus.search import plot, recipe_space
    from pluribus.search import run as run_search
    from pluribus.search.algorithms import ALGORITHMS, facts

    if facts(ALGORITHMS[algorithm]).shares_weights:
        raise InputError(
            f"{algorithm} shares weights between modules; recipes are searched by random, sweep, "
            "evolution, hill, nsga2, cma or tpe"
        )
    check_page(html)
    out = None if out is None else out.expanduser()
    if store is not None and store.exists() and not resume:
        raise OutputError(f"{store}: exists; leave out --no-resume to go on, or name another file")
    loaded = recipe_space.load(space)
    if out is not None:
        recipe_space.check_out(loaded, out, overwrite)
    study = run_search(
        loaded.space,
        loaded.evaluate,
        algorithm,
        trials,
        list(loaded.objective.minimise),
        budget,
        store,
        seed,
        workers,
        ray,
        evaluation=loaded.objective.text,
        on_error="record",
        on_trial=_progress(trials, quiet),
    )
    for note in study.notes:
        warn(note)
    best = study.best  # an error if every trial failed
    faults = []  # of the disk: what was found is shown all the same
    if out is not None:
        try:
            recipe_space.save_best(loaded, study, out)
        except OutputError as error:
            faults.append(error)
            out = None
    if html is not None:
        try:
            save(html, plot.best_page(study, f"Search of {space.name}", loaded.objective.text))
        except OutputError as error:
            faults.append(error)
            html = None
    recipe = loaded.recipe(study.value(best))
    if as_json:
        show_json(
            {
                **study.to_dict(),
                "space_size": loaded.space.size,
                "objective": loaded.objective.text,
                "recipe": recipe.plain(),
                "out": None if out is None else str(out),
                "html": None if html is None else str(html),
                "store": None if store is None else str(store),
            }
        )
        if faults:
            raise faults[0]
        return
    print(plot.best_table(study, top))
    failed = sum(trial.status == "failed" for trial in study.trials)
    print(
        f"\nbest: trial {best.number} of {len(study.trials)} "
        f"({_scores(best.scores)}; {loaded.objective.text})"
        + (f", {failed} failed" if failed else "")
        + (f", {study.resumed} from {store}" if study.resumed else "")
    )
    if out is None:
        print(f"\n{recipe.to_yaml()}", end="")
    else:
        print(f"{out}: the best recipe, for pluribus merge {out} merged/")
    if html is not None:
        print(f"{html}: the front and all trials")
    if faults:
        raise faults[0]


def _scores(scores) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in scores.items())


def _progress(trials: int, quiet: bool):
    """Return what shows each trial on one line of stderr; None if stderr is no terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        return None

    def show(trial, study) -> None:
        if study.done:
            best = study.best
            told = f"best {_scores(best.scores)} (trial {best.number})"
        else:
            told = f"no score yet: {trial.error}"
        count = sum(t.status != "running" for t in study.trials)
        end = "\n" if count >= trials else ""
        print(f"\r\x1b[Ktrial {count}/{trials}  {told[:100]}", end=end, file=sys.stderr, flush=True)

    return show

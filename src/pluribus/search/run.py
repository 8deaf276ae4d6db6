"""Search a space: propose a point, evaluate it, tell the algorithm, store what happened.

Trials are numbered in the order of proposals, and the algorithm hears of them in that order:
before trial i is proposed it knows exactly the first max(0, i - workers + 1) scores. So a study is
a function of space, algorithm, seed and `workers`, whatever takes how long, and a resumed one
proposes what an uninterrupted one would have: the history is proposed again, checked against the
store, and told again. Only if that does not reproduce it (another version of a library) the history
is given to the algorithm's `recover`, and the study says so in its notes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pluribus.core.errors import InputError
from pluribus.search.algorithms import algorithm_of, facts
from pluribus.search.execute import Evaluation
from pluribus.search.loop import Loop
from pluribus.search.space import space as space_of
from pluribus.search.store import Store
from pluribus.search.study import Direction, Objective, OnTrial, Study, Trial

Objectives = str | Sequence[str] | Mapping[str, str]


def run(
    space: Any,
    evaluate: Callable[..., Any],
    algorithm: Any = "random",
    trials: int = 60,
    cost: Any = None,
    budget_s: float | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    workers: int = 1,
    ray: bool = False,
    *,
    objectives: Objectives | None = None,
    evaluation: str = "",
    known: Sequence[Trial] = (),
    on_error: Literal["raise", "record"] = "raise",
    on_trial: OnTrial | None = None,
) -> Study:
    """Search `space` for what `evaluate` scores best, in at most `trials` trials.

    `evaluate(obj)` returns a number, or a mapping that holds every objective (others in it are kept
    as metrics). If it has parameters called `seed` and `report`, it gets the trial's own seed, and
    a dictionary to fill with what is to be stored with the trial. `objectives` names what is
    maximised (default "score"), or maps names to "max" or "min". `cost` is a function of the object
    (see `pluribus.search.cost`), a mapping of names to such, or names of figures that `evaluate`
    returns: an algorithm with several objectives minimises them, others only record them.

    With `store` the study survives its process and goes on where it stopped; `evaluation` is a text
    that says what scores mean, and a store with another is refused. `known` are trials of an
    earlier study of this space: they become the first ones, and the algorithm starts from them.
    `budget_s` bounds this call: no trial begins after so many seconds. `workers` processes (or Ray
    tasks) run trials at a time; `evaluate` and the objects must then be picklable.

    A NaN or infinite score makes a trial failed, and the algorithm is told the worst so far. With
    `on_error="record"` so do errors of `evaluate`; otherwise they end the search, and the trial is
    run again when it is resumed.

    Raises RecipeError for an unknown algorithm; InputError for a space or objectives that it can't
    search, and scores that are no numbers; what `Store.open` raises.
    """
    began = time.monotonic()
    space = space_of(space)
    chosen = algorithm_of(algorithm)
    about = facts(chosen)
    _check(trials, budget_s, workers, seed)
    costs = _costs(cost)
    wanted = objectives_of(objectives)
    if len(wanted) > 1 and not about.many:
        raise InputError(
            f"{about.name} optimises one objective, but {', '.join(o.name for o in wanted)} are "
            f"{len(wanted)}: use nsga2 or tpe, or make one of them and pass the others as cost"
        )
    names = [o.name for o in wanted]
    if twice := [name for name in costs if name in names]:
        raise InputError(f"{twice[0]!r} is both an objective and a cost; rename one")
    every = (*wanted, *(Objective(name, "min") for name in costs))
    told = every if about.many else wanted
    loop = Loop(space, chosen, every, told, seed)
    loop.evaluation = Evaluation(evaluate, costs, tuple(every), on_error == "record")
    loop.deadline = None if budget_s is None else began + budget_s
    opened = None if store is None else Store.open(store, space, every, evaluation)
    loop.store, loop.began, loop.on_trial = opened, began, on_trial
    try:
        if opened is not None:
            loop.restore(opened.rows())
        if known and not loop.trials:
            loop.adopt(known)
        if space.constant:
            trials = 1
            loop.notes.append("the space has no placeholder: what it holds was evaluated once")
        if about.shares_weights and not space.constant:
            loop.share(trials, evaluate)
        else:
            loop.search(trials, workers, ray)
    finally:
        if opened is not None:
            opened.close()
    return loop.study()


def _check(trials: int, budget_s: float | None, workers: int, seed: int) -> None:
    for name, value, least in (("trials", trials, 1), ("workers", workers, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} = {value!r}: give a whole number, {least} or more")
    if budget_s is not None and not budget_s > 0:
        raise InputError(f"budget_s = {budget_s!r}: give seconds above 0, or None for no limit")


def objectives_of(given: Objectives | None) -> tuple[Objective, ...]:
    """Return the objectives that a user named. Raises InputError for none, twins, directions."""
    if given is None:
        return (Objective("score"),)
    named = {given: "max"} if isinstance(given, str) else given
    pairs = named.items() if isinstance(named, Mapping) else [(name, "max") for name in named]
    out = []
    for name, direction in pairs:
        if direction not in ("max", "min"):
            raise InputError(f"objective {name!r}: {direction!r} is no direction; give max or min")
        out.append(Objective(str(name), cast(Direction, direction)))
    if not out or len({o.name for o in out}) < len(out):
        raise InputError(f"objectives = {given!r}: name each once, and at least one")
    return tuple(out)


def _costs(given: Any) -> dict[str, Callable[[Any], float] | None]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {given: None}
    if isinstance(given, list | tuple):
        return {name: cost for one in given for name, cost in _costs(one).items()}
    named = given if isinstance(given, Mapping) else {_name(given): given}
    for name, function in named.items():
        if not callable(function):
            raise InputError(
                f"cost {name!r} = {function!r}: give a function of the object, such as "
                "search.cost.Table({...}) or search.cost.Parameters(build), or the name of a "
                "figure that evaluate returns"
            )
    return {str(name): function for name, function in named.items()}


def _name(function: Any) -> str:
    return getattr(function, "name", None) or getattr(function, "__name__", None) or "cost"

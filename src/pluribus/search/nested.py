"""Searches inside searches: some choices outside, the rest found by a search of their own.

After the NAS-Bench-101 case study of the PyGlove paper (section 4.3), whose names these are:

    nested      an outer algorithm proposes some of the choices; for each proposal an inner one
                searches the rest, and the outer reward is the mean of its `top` best scores
    factorized  nested, with the outer choices named by path: operations outside, wiring inside
    flat        one algorithm over everything, the same as `run`
    hybrid      nested for some trials, then flat evolution that starts from the best of them

The seeding of `hybrid` is ours: the paper doesn't say how its second phase begins.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pluribus.core.errors import InputError, nearest
from pluribus.search._pyglove import pg
from pluribus.search.algorithms import algorithm_of, facts
from pluribus.search.loop import trial_seed
from pluribus.search.run import Objectives, objectives_of, run
from pluribus.search.space import Space
from pluribus.search.space import space as space_of
from pluribus.search.study import Objective, Study, Trial

Split = Callable[[Any], bool] | Sequence[str]


def nested(
    space: Any,
    evaluate: Callable[..., Any],
    outer: Any = "evolution",
    inner: Any = "evolution",
    split: Split = (),
    *,
    outer_trials: int = 8,
    inner_trials: int = 8,
    top: int = 1,
    store: str | Path | None = None,
    seed: int = 0,
    objectives: Objectives | None = None,
    **options: Any,
) -> Study:
    """Search some choices outside and the rest inside; return all inner trials as one study.

    `split` says which placeholders are outside: paths ("ops" takes everything below it), or a
    function of a pyglove placeholder. There are up to `outer_trials` times `inner_trials`
    evaluations. `options` go to both runs (`cost`, `on_error`), `store` keeps the outer trials with
    their inner ones in it. Raises InputError for a split that puts everything on one side, for more
    than one objective, and what `run` raises.
    """
    space = space_of(space)
    wanted = objectives_of(objectives)
    if len(wanted) > 1:
        raise InputError("nested searches have one objective; give the others as metrics or cost")
    first = next(iter(wanted))
    outside = _outside(space, split)
    if not 1 <= top <= inner_trials:
        raise InputError(f"top = {top}: give 1 to inner_trials = {inner_trials}")

    def whole(rest: Any, seed: int, report: dict[str, Any]) -> float:
        """Search the placeholders that the outer point leaves."""
        study = run(
            Space(rest),
            evaluate,
            inner,
            inner_trials,
            seed=seed,
            objectives=objectives,
            **options,
        )
        report["inner"] = [
            {**trial.to_dict(), "dna": _whole_point(space, study, trial).to_json_str()}
            for trial in study.trials
        ]
        scores = sorted((first.sign * t.scores[first.name] for t in study.done), reverse=True)
        return first.sign * statistics.fmean(scores[:top]) if scores else float("nan")

    study = run(
        outside,
        whole,
        outer,
        outer_trials,
        store=store,
        seed=seed,
        objectives={first.name: first.direction},
        evaluation=f"nested: {algorithm_of(inner)!r}, {inner_trials} trials, top {top}",
    )
    trials: list[Trial] = []
    for trial in study.trials:
        for told in trial.report.get("inner", ()):
            dna = space.fitted(pg.from_json_str(told["dna"]))
            trials.append(Trial(**{**told, "dna": dna, "number": len(trials)}))
    names = f"nested({facts(algorithm_of(outer)).name}, {facts(algorithm_of(inner)).name})"
    every = (*wanted, *(Objective(n, "min") for n in _cost_names(trials, wanted)))
    return dataclasses.replace(
        study, space=space, trials=tuple(trials), algorithm=names, objectives=every
    )


def factorized(
    space: Any, evaluate: Callable[..., Any], outside: Sequence[str], **options: Any
) -> Study:
    """Search the choices at the paths `outside` in the outer loop, the rest in the inner one.

    The options are those of `nested`.
    """
    return nested(space, evaluate, split=outside, **options)


def flat(
    space: Any,
    evaluate: Callable[..., Any],
    algorithm: Any = "evolution",
    trials: int = 64,
    **options: Any,
) -> Study:
    """Search all choices together. The options are those of `run`."""
    return run(space, evaluate, algorithm, trials, **options)


def hybrid(
    space: Any,
    evaluate: Callable[..., Any],
    split: Split,
    *,
    outer: Any = "evolution",
    inner: Any = "evolution",
    algorithm: Any = "evolution",
    outer_trials: int = 4,
    inner_trials: int = 8,
    trials: int = 64,
    start: int = 16,
    store: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Study:
    """Run `nested` first, then `algorithm` over everything, starting from the `start` best.

    `trials` counts the evaluations of both phases together. With `store` the first phase is kept
    beside it, in NAME.nested.
    """
    space = space_of(space)
    before = None if store is None else Path(f"{store}.nested")
    first = nested(
        space,
        evaluate,
        outer,
        inner,
        split,
        outer_trials=outer_trials,
        inner_trials=inner_trials,
        store=before,
        seed=seed,
        **options,
    )
    left = trials - len(first.trials)
    if left < 1:
        raise InputError(
            f"trials = {trials}: the nested phase takes {len(first.trials)}, which leaves none for "
            "the flat one; give more, or fewer outer_trials or inner_trials"
        )
    goal = first.objectives[0]
    best = sorted(first.done, key=lambda t: (-goal.sign * t.scores[goal.name], t.number))[:start]
    # The worst of those kept goes first: algorithms that forget forget the earliest.
    second = run(
        space,
        evaluate,
        algorithm,
        len(best) + left,
        known=best[::-1],
        store=store,
        seed=trial_seed(seed, -1),
        **options,
    )
    kept = {str(trial.dna) for trial in best}
    others = [trial for trial in first.trials if str(trial.dna) not in kept]
    joined = [dataclasses.replace(t, number=i) for i, t in enumerate([*others, *second.trials])]
    return dataclasses.replace(
        second, trials=tuple(joined), algorithm=f"hybrid({first.algorithm}, {second.algorithm})"
    )


def _outside(space: Space, split: Split) -> Space:
    """Return the space of the outer choices. Raises InputError unless both sides have some."""
    if space.function is not None:
        raise InputError("a traced function can't be split: give an object with placeholders")
    pick = split if callable(split) else _below(space, split)
    outside = space.split(pick)
    if outside.constant or pg.is_deterministic(outside.symbolic(outside.spec.first_dna())):
        side = "inside" if outside.constant else "outside"
        raise InputError(
            f"the split puts every choice {side}; the space has: {', '.join(space.decisions)}"
        )
    return outside


def _below(space: Space, paths: Sequence[str]) -> Callable[[Any], bool]:
    known = list(space.decisions)
    for path in paths:
        if not any(_under(one, path) for one in known):
            raise InputError(
                f"no choice stands at {path!r}; there are: {', '.join(known[:12])}."
                + nearest(path, known)
            )
    return lambda placeholder: any(_under(str(placeholder.sym_path), path) for path in paths)


def _under(one: str, path: str) -> bool:
    return one == path or (one.startswith(path) and one[len(path)] in ".[")


def _whole_point(space: Space, study: Study, trial: Trial) -> Any:
    """Return the point of the whole space that an inner trial evaluated."""
    return space.encode(study.space.symbolic(trial.dna))


def _cost_names(trials: Sequence[Trial], wanted: Sequence[Objective]) -> list[str]:
    names = [o.name for o in wanted]
    return [name for name in (trials[0].scores if trials else ()) if name not in names]

"""A study for people: a table for the terminal, and a page with the front of score against cost."""

from collections.abc import Sequence

from pluribus.report import Html, aligned, lines, number, page, scatter, section, table, text
from pluribus.search.study import Study, Trial

PREFERRED = ("experts", "bytes", "parameters", "flops", "latency", "merge_seconds")
LABELLED = 8  # points of the front that are named in the plot


def best_table(study: Study, most: int = 10) -> str:
    """Return the best trials as lines of text, the best first."""
    ranked = ranking(study)[:most]
    names = [o.name for o in study.objectives]
    rows = [
        [t.number, *(t.scores[n] for n in names), t.seconds, chosen(study, t, 90)] for t in ranked
    ]
    return aligned(["trial", *names, "seconds", "choices"], rows, {"seconds": ".2f"})


def chosen(study: Study, trial: Trial, most: int = 200) -> str:
    """Return the choices of a trial on one line, cut at `most` characters."""
    told = []
    for path, choice in study.space.point(trial.dna).items():
        name = _end(path)
        bare = isinstance(choice, str) or (isinstance(choice, list) and isinstance(choice[0], str))
        told.append(_cell(choice) if bare else f"{name} {_cell(choice)}")
    line = ", ".join(told) or "no choice"
    return line if len(line) <= most else f"{line[: most - 1]}…"


def ranking(study: Study) -> list[Trial]:
    """Return the trials with scores, the best in the first objective first."""
    first = study.objectives[0]
    return sorted(study.done, key=lambda t: (-first.sign * t.scores[first.name], t.number))


def against(study: Study) -> str:
    """Return what to plot the score against: a second objective, else a figure that varies."""
    if len(study.objectives) > 1:
        return study.objectives[1].name
    for name in PREFERRED:
        values = {trial.figure(name) for trial in study.done}
        if len(values) > 1 and not any(value != value for value in values):
            return name
    return "seconds"


def best_page(study: Study, title: str = "Search", subtitle: str = "") -> str:
    """Return a page: the front, how the best score rose, the best trials, and what was searched.

    Raises InputError if no trial has a score.
    """
    best, first = study.best, study.objectives[0]
    summary = [
        text(
            f"Best of {len(study.done)} trials: {first.name} {best.scores[first.name]:.6g} in "
            f"trial {best.number}: {chosen(study, best)}."
        )
    ]
    failed = [trial for trial in study.trials if trial.status == "failed"]
    if failed:
        summary.append(text(f"{len(failed)} trials failed; the first: {failed[0].error}."))
    summary += [text(f"{note[0].upper()}{note[1:]}.") for note in study.notes]
    parts = [
        section("Result", *summary),
        section("Score against cost", _front(study)),
        section("Progress", _progress(study)),
        section("Best trials", _table(study, ranking(study)[:20])),
        section(
            "Space", table(["choice", "offers"], [list(p) for p in study.space.decisions.items()])
        ),
    ]
    size = "infinite" if study.space.size < 0 else f"{study.space.size:,}"
    about = f"{study.algorithm}, seed {study.seed}, space of size {size}, {study.space.digest[:12]}"
    return page(title, parts, subtitle=f"{subtitle} · {about}" if subtitle else about)


def _front(study: Study) -> Html:
    first, cost = study.objectives[0].name, against(study)
    sign = study.objectives[0].sign
    cheapest = sorted(study.done, key=lambda t: (_figure(t, cost), -sign * t.scores[first]))
    on_front: list[str] = []
    best = -float("inf")
    for trial in cheapest:  # the plot's own front: nothing is cheaper and better
        if sign * trial.scores[first] > best:
            best = sign * trial.scores[first]
            on_front.append(_name(trial))
    points = [(_name(t), _figure(t, cost), t.scores[first]) for t in study.done]
    groups = {name: "front" if name in on_front else "other trials" for name, _, _ in points}
    points.sort(key=lambda p: groups[p[0]] != "front")  # which colours the front first
    return scatter(
        f"{first} against {cost}",
        points,
        x_label=cost,
        y_label=first,
        y_form=".4g",
        groups=groups,
        labelled=set(on_front[-LABELLED:]),
    )


def _progress(study: Study) -> Html:
    first = study.objectives[0]
    so_far: list[float | None] = []
    scores: list[float | None] = []
    best: float | None = None
    for trial in study.trials:
        score = trial.scores[first.name] if trial.status == "done" else None
        if score is not None and (best is None or first.sign * (score - best) > 0):
            best = score
        so_far.append(best)
        scores.append(score)
    places = [str(trial.number) for trial in study.trials]
    return lines(
        f"{first.name} by trial",
        places,
        {"best so far": so_far, "trial": scores},
        x_label="trial",
        form=".4g",
    )


def _table(study: Study, trials: Sequence[Trial]) -> Html:
    names = [o.name for o in study.objectives]
    metrics = list(dict.fromkeys(name for t in trials for name in t.metrics))
    rows = []
    for trial in trials:
        scores = [trial.scores[name] for name in names]
        more = [trial.metrics.get(name) for name in metrics]
        rows.append([trial.number, *scores, chosen(study, trial), *more, trial.seconds])
    return table(["trial", *names, "choices", *metrics, "seconds"], rows, {"seconds": ".2f"})


def _figure(trial: Trial, name: str) -> float:
    return trial.seconds if name == "seconds" else trial.figure(name)


def _name(trial: Trial) -> str:
    return f"trial {trial.number}"


def _end(path: str) -> str:
    """Return the telling end of a path: of `models[0].parameters.weight` it is `[0].weight`."""
    parts = [part for part in path.split(".") if part != "parameters"]
    end = parts[-1]
    at = parts[-2].rpartition("[")[1:] if len(parts) > 1 and "=" not in parts[-2] else ()
    return f"{''.join(at)}.{end}" if at and at[0] else end


def _cell(choice: object) -> str:
    if isinstance(choice, list):
        return ", ".join(map(_cell, choice))
    return number(choice, ".3g") if isinstance(choice, float) else " ".join(str(choice).split())

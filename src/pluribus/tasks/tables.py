"""Reports as a table for a terminal and as a page with plots."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pluribus import report

if TYPE_CHECKING:
    from pluribus.tasks.evaluate import Report, Reports


def table(reports: "Reports") -> str:
    """Return a row a task and a column a system: score ± standard error, normalised in brackets."""
    head, rows = _grid(reports, shares=True)
    return report.aligned(head, rows, _FORMS)


def page(reports: "Reports", title: str) -> str:
    """Return plots of scores, normalised ones too where there are specialists, and all figures."""
    sections = [report.section("Over all tasks", *_overall(reports))]
    if any(r.normalised is not None for r in reports.reports):
        sections.append(
            report.section(
                "Against the specialists",
                "Each score over the score of the task's own specialist on the same rows: 1 is as "
                "good as the specialist. A dash: no specialist is given.",
                _heat(reports, "Normalised score", lambda r: r.normalised),
            )
        )
    head, rows = _grid(reports, shares=False)
    sections += [
        report.section(
            "Task by task",
            "Higher is better. The floor is the score of always answering the commonest class of "
            "the rows scored; ± is one standard error.",
            _heat(reports, "Score", lambda r: r.score, floor=True),
            report.table(head, rows, _FORMS),
        ),
        report.section("How it was measured", *_how(reports)),
    ]
    return report.page(title, sections, subtitle=_subtitle(reports))


_FORMS = {"floor": ".3f"}


def _overall(reports: "Reports") -> list[report.Html]:
    means = {system: reports.mean(system) for system in reports.systems}
    charts = [
        report.bars(
            f"Mean score of {_tasks(len(reports.tasks))}",
            {system: mean for system, (mean, _) in means.items()},
            errors={system: error for system, (_, error) in means.items()},
            form=".2f",
        )
    ]
    shares = {system: reports.mean_normalised(system) for system in reports.systems}
    if any(share is not None for share in shares.values()):
        judged = {r.task for r in reports.reports if r.normalised is not None}
        charts.append(
            report.bars(f"Mean normalised score of {_tasks(len(judged))}", shares, form=".2f")
        )
    return charts


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _grid(reports: "Reports", shares: bool) -> tuple[list[str], list[list]]:
    systems = reports.systems
    head = ["task", "metric", "rows", "floor", *systems]
    rows: list[list] = []
    for task in reports.tasks:
        found = [reports.get(system, task) for system in systems]
        first = next(r for r in found if r is not None)
        cells = [
            None
            if r is None
            else _cell(r.score, r.standard_error, r.normalised if shares else None)
            for r in found
        ]
        rows.append([task, first.metric, first.n, first.floor, *cells])
    if len(rows) > 1:
        means = [
            _cell(*reports.mean(s), reports.mean_normalised(s) if shares else None) for s in systems
        ]
        rows.append(["mean", "", None, None, *means])
    return head, rows


def _cell(score: float, error: float | None, share: float | None) -> str:
    told = "" if error is None else f" ±{error:.3f}"
    return f"{score:.3f}{told}" + ("" if share is None else f" ({share:.2f})")


def _heat(
    reports: "Reports",
    title: str,
    value: Callable[["Report"], float | None],
    floor: bool = False,
) -> report.Html:
    cells, columns = [], list(reports.systems)
    for task in reports.tasks:
        found = [reports.get(system, task) for system in reports.systems]
        floors = [next((r.floor for r in found if r is not None), None)] if floor else []
        cells.append([*floors, *(None if r is None else value(r) for r in found)])
    head = ["floor", *columns] if floor else columns
    return report.heatmap(title, reports.tasks, head, cells, low=-1, high=1)


def _how(reports: "Reports") -> list[str]:
    first = reports.reports[0]
    rows = [reports.get(reports.systems[0], task) for task in reports.tasks]
    told = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    weights = []
    for system in reports.systems:
        mine = [r for r in reports.reports if r.system == system]
        settings = ", ".join(f"{k} {v}" for k, v in mine[0].settings.items())
        weights.append([system, settings, sum(r.seconds for r in mine), mine[0].weights])
    notes = dict.fromkeys(f"{r.system}, {r.task}: {n}" for r in reports.reports for n in r.notes)
    return [
        f"Rows are chosen by seed {first.seed}, the same for every system. Versions: {told}.",
        report.table(
            ["system", "settings", "seconds", "digest of the weights"], weights, {"seconds": ".1f"}
        ),
        report.table(
            ["task", "rows", "of", "digest of the rows"],
            [[r.task, r.n, r.of, r.data] for r in rows if r is not None],
        ),
        *([report.notes(list(notes), warning=True)] if notes else []),
    ]


def _subtitle(reports: "Reports") -> str:
    first = reports.reports[0]
    count = len(reports.systems)
    systems = "1 system" if count == 1 else f"{count} systems"
    return f"{systems}, {_tasks(len(reports.tasks))}, seed {first.seed}"

"""What claims measured, to look at: a page, and tables for the docs.

Figures that a claim names BED/SYSTEM/QUANTITY make one table a bed, a row a system; where it has
the quantities `storage` and `accuracy`, they are drawn against each other too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pluribus.report import charts, html

Record = Mapping[str, Any]  # what `Outcome.to_dict` returns


def tables(record: Record) -> dict[str, dict[str, dict[str, Mapping[str, Any]]]]:
    """Return bed -> system -> quantity -> figure (mean, sd, per_seed), in the record's order."""
    found: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for name, figure in record["figures"].items():
        if name.count("/") == 2:
            bed, system, quantity = name.split("/")
            found.setdefault(bed, {}).setdefault(system, {})[quantity] = figure
    return found


def markdown(record: Record) -> str:
    """Return the tables of one record, with mean and spread."""
    parts = []
    for bed, systems in tables(record).items():
        quantities = list(next(iter(systems.values())))
        lines = [
            f"| {bed} | {' | '.join(quantities)} |",
            "| --- |" + " ---: |" * len(quantities),
        ]
        for system, row in systems.items():
            cells = " | ".join(_cell(row[quantity]) for quantity in quantities)
            lines.append(f"| {system} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(figure: Mapping[str, Any]) -> str:
    seeds, form = figure["per_seed"], ".1f" if abs(figure["mean"]) >= 10 else ".2f"
    mean = f"{figure['mean']:{form}}"
    if max(seeds) - min(seeds) < 5e-3:
        return mean
    return f"{mean} ({', '.join(f'{value:{form}}' for value in seeds)})"


def page(records: Sequence[Record]) -> str:
    """Return a page of some records."""
    return html.page(
        "Claims" if len(records) > 1 else records[0]["title"],
        [html.section(f"{r['claim']}: {r['verdict']}", *_parts(r)) for r in records],
        subtitle="what was measured, seed by seed",
    )


def _parts(record: Record) -> list[html.Html | str]:
    rows = [
        [
            check["text"],
            check["measured"],
            ", ".join(f"{value:.2f}" for value in check["per_seed"]),
            check["expected"],
            ("holds" if check["holds"] else "fails") + ("" if check["asserted"] else " (reported)"),
        ]
        for check in record["checks"]
    ]
    parts: list[html.Html | str] = [
        record["title"],
        f"Data: {record['data']}. Model: {record['model']}. Figures: {record['metric']}. Seeds: "
        f"{', '.join(map(str, record['seeds']))}. Again: {record['command']}",
        html.table(
            ["inequality", "mean", "by seed", "expected", "verdict"], rows, {"mean": "+.2f"}
        ),
    ]
    beds = tables(record)
    for bed, systems in beds.items():
        quantities = list(next(iter(systems.values())))
        if {"storage", "accuracy"} <= set(quantities):
            points = [
                (system, row["storage"]["mean"], row["accuracy"]["mean"])
                for system, row in systems.items()
            ]
            parts.append(
                charts.scatter(
                    f"{bed}: accuracy against storage, percent of the specialists'",
                    points,
                    x_label="storage",
                    y_label="accuracy",
                    groups={name: _group(name) for name in systems},
                    labelled=_apart(points),
                )
            )
        parts.append(
            html.table(
                [bed, *quantities],
                [
                    [system, *(row[q]["mean"] for q in quantities)]
                    for system, row in systems.items()
                ],
                dict.fromkeys(quantities, ".2f"),
                caption=f"{bed}, means of the seeds",
            )
        )
    others = [[n, f["mean"], f["sd"]] for n, f in record["figures"].items() if n.count("/") != 2]
    if others:
        parts.append(
            html.table(["figure", "mean", "spread"], others, {"mean": ".2f", "spread": ".2f"})
        )
    return parts


def _group(system: str) -> str:
    """Return what stands behind a comma in a system's name: how its parts are chosen."""
    return system.partition(", ")[2] or "one model"


def _apart(points: Sequence[tuple[str, float, float]]) -> list[str]:
    """Return the names of points that are alone at their x, or the best of those that share it."""
    best: dict[float, tuple[float, str]] = {}
    for name, x, y in points:
        best[round(x, 1)] = max(best.get(round(x, 1), (float("-inf"), "")), (y, name))
    return [name for _, name in best.values()]

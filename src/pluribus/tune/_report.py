"""Show a tuned composition: coefficients by layer in a terminal, and a page with plots."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from pluribus import report
from pluribus.core.depth import depth_map

if TYPE_CHECKING:
    from pluribus.tune._result import Tuned

POINTS = 20  # of a line, at most: single steps are noise


def by_layer(tuned: "Tuned") -> tuple[list[str], list[list[float]]]:
    """Return names of layers (and "outside") and each expert's mean coefficient there."""
    assert tuned.pool.base is not None
    layers = depth_map(tuned.pool.base, "auto").layers
    groups: dict[int, list[tuple[float, ...]]] = {}
    for name, values in tuned.coefficients.table():
        layer = layers.get(name)
        groups.setdefault(-1 if layer is None else layer, []).append(values)
    names, rows = [], []
    for layer in sorted(groups):
        names.append("outside" if layer < 0 else f"layer {layer}")
        rows.append([statistics.fmean(column) for column in zip(*groups[layer], strict=True)])
    return names, rows


def text(tuned: "Tuned") -> str:
    """Return a table of mean coefficients, one row a layer, one column an expert."""
    names, rows = by_layer(tuned)
    experts = list(tuned.coefficients.experts)
    body = [[name, *row] for name, row in zip(names, rows, strict=True)]
    return report.aligned(["mean coefficient", *experts], body, dict.fromkeys(experts, "+.3f"))


def save(tuned: "Tuned", path: Path) -> None:
    """Write a page: losses, agreement, coefficients, warnings."""
    steps = tuned.log.steps
    every = max(1, len(steps) // POINTS)
    shown = steps[::every]
    names, rows = by_layer(tuned)
    parts: list[str] = []
    if tuned.warnings:
        parts.append(report.notes(tuned.warnings, warning=True))
    if steps:
        tasks = list(steps[0].by_task)
        losses = {
            task: [
                statistics.fmean(step.by_task[task] for step in steps[i : i + every])
                for i in range(0, len(steps), every)
            ]
            for task in tasks
        }
        parts.append(
            report.section(
                "Objective",
                "The loss of each task, averaged over a few steps. It is what was minimised, not "
                "accuracy.",
                report.lines(
                    "Loss by task",
                    [str(step.number) for step in shown],
                    losses,
                    x_label="step",
                    y_label="loss",
                ),
            )
        )
    agreed = [step for step in steps if step.agreement is not None]
    if agreed:
        parts.append(
            report.section(
                "Agreement with the experts",
                "Share of a few fixed inputs on which the merged model names the class that the "
                "task's own expert names. It needs no label; where it falls while the loss falls, "
                "the model grows sure without being right.",
                report.lines(
                    "Agreement",
                    [str(step.number) for step in agreed],
                    {"agreement": [step.agreement for step in agreed]},
                    form=".1%",
                    x_label="step",
                    y_label="share of inputs",
                    zero=False,
                ),
            )
        )
    parts.append(
        report.section(
            "Coefficients",
            "Mean over the tensors of a layer: how much of each expert's update was added.",
            report.heatmap(
                "Mean coefficient by layer and expert",
                names,
                list(tuned.coefficients.experts),
                rows,
            ),
        )
    )
    told = tuned.report()
    count = len(tuned.coefficients.experts)
    title = f"{told['method']}: {count} experts, {len(steps)} steps"
    report.save(path, report.page(title, parts, subtitle=told["stopped"]))

"""The demo's table for the terminal and its HTML report."""

from pathlib import Path
from typing import TYPE_CHECKING

from pluribus.report import aligned, bars, heatmap, notes, page, save, scatter, section, table

if TYPE_CHECKING:
    from pluribus.demo import Demo

HEADER = ("way", "kind", "score", "worst task", "size", "time", "setting")


def rows(demo: "Demo") -> list[tuple[str, str, float, float, float, float, str]]:
    """Return the table's rows: size in checkpoints, time in seconds."""
    return [
        (
            row.name,
            row.kind,
            100 * row.score,
            100 * min(row.tasks.values()),
            row.bytes / demo.checkpoint_bytes,
            row.seconds,
            row.setting,
        )
        for row in demo.rows
    ]


FORMS = {"score": ".1f", "worst task": ".1f", "size": ".2f", "time": ".2f"}


def text(demo: "Demo") -> str:
    """Return the table for a terminal."""
    mean = 100 * sum(demo.expert_scores.values()) / len(demo.expert_scores)
    lines = [
        aligned(HEADER, rows(demo), FORMS),
        "",
        f"score, worst task: percent of the specialist's own accuracy ({mean:.1f} % on average); "
        "size: in checkpoints; time: seconds to merge",
        *demo.checks,
        f"report: {demo.out / 'report.html'} ({demo.seconds:.0f} s in all)",
    ]
    return "\n".join(lines)


def write(demo: "Demo", path: Path) -> None:
    """Write the report."""
    static = [row for row in demo.rows if row.kind == "one model" and row.name != "base"]
    best = max(static, key=lambda row: row.score)
    stores = [row for row in demo.rows if row.kind == "a store" and row.name != "specialists"]
    kept = max(stores, key=lambda row: row.score)
    shown = [row for row in demo.rows if row.name != "specialists"]
    dots = sorted(demo.rows, key=lambda row: row.kind == "a store")  # in the colours of the bars
    told = [*(row.name for row in demo.rows if row.kind == "a store"), best.name, "base"]
    found = [
        section(
            "What came out",
            f"Eight specialists were trained from one base on eight views of handwritten digits. "
            f"The best single merged model, {best.name}, keeps {best.score:.1%} of their accuracy "
            f"at an eighth of their size; the store {kept.name} keeps {kept.score:.1%} at "
            f"{kept.bytes / (demo.checkpoint_bytes * len(demo.tasks)):.0%} of it.",
            bars(
                "Mean accuracy, percent of the specialist's own",
                {row.name: 100 * row.score for row in demo.rows},
                form=".1f",
                marked=[row.name for row in demo.rows if row.kind == "a store"],
            ),
        ),
        section(
            "Accuracy against storage",
            scatter(
                "Upper left is better",
                [(row.name, row.bytes / demo.checkpoint_bytes, 100 * row.score) for row in dots],
                x_label="size, in checkpoints",
                y_label="percent of the specialist's accuracy",
                groups={row.name: row.kind for row in demo.rows},
                labelled=told,
                x_zero=True,
            ),
        ),
        section(
            "Task by task",
            heatmap(
                "Percent of the specialist's own accuracy",
                [row.name for row in shown],
                list(demo.tasks),
                [[100 * row.tasks[task] for task in demo.tasks] for row in shown],
                form=".0f",
                low=0,
                high=100,
            ),
        ),
        section("All figures", table(HEADER, rows(demo), FORMS)),
        section(
            "What was written and read back",
            notes(list(demo.checks)),
            "Scales were chosen on validation images, scores are on test images.",
        ),
    ]
    save(path, page("pluribus demo: eight specialists, one system", found))

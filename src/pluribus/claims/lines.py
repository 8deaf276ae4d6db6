"""LiNeS: scaling updates by depth improves every merge it is put behind."""

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import DATA, GRID, METRIC, MODEL, Bed, merge8
from pluribus.claims.ties import ties
from pluribus.core.registry import MERGERS

WIDE = tuple(round(0.1 * step, 1) for step in range(1, 21))  # 0.1 ... 2.0

CLAIM = Claim(
    name="lines",
    title="Linear scaling over depth improves merges (gain averaged over three methods)",
    paper="arXiv:2410.17146",
    data=DATA,
    model=MODEL,
    metric=METRIC,
    checks=(
        Check(
            text="mean gain over task arithmetic, consensus and TIES (sum)",
            left="with_lines",
            right="without_lines",
            margin=1.0,
        ),
        Check(text="task arithmetic", left="task_arithmetic_lines", right="task_arithmetic"),
        Check(text="consensus", left="consensus_lines", right="consensus"),
        Check(text="TIES (sum)", left="ties_sum_lines", right="ties_sum"),
        Check(text="TIES (mean)", left="ties_mean_lines", right="ties_mean", asserted=False),
        Check(text="PCB", left="pcb_lines", right="pcb", asserted=False),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed: each method tuned alone, and with LiNeS, same grid."""
    bed = merge8(seed, on_step)
    methods = {
        "task_arithmetic": (MERGERS.build("task_arithmetic", {"weight": 1.0}), GRID),
        "consensus": (MERGERS.build("consensus", {"k": 2, "lambda": 1.0}), GRID),
        "ties_sum": (ties(agg="sum"), WIDE[:15]),
        "ties_mean": (ties(), WIDE),
        "pcb": (MERGERS.build("pcb", {"ratio": 0.1, "lambda": 1.0}), WIDE),
    }
    out: dict[str, float] = {}
    for name, (method, grid) in methods.items():
        out[name] = bed.tuned(method, grid)
        out[f"{name}_lines"] = best_beta(bed, method, grid)
    three = ("task_arithmetic", "consensus", "ties_sum")
    out["without_lines"] = sum(out[name] for name in three) / 3
    out["with_lines"] = sum(out[f"{name}_lines"] for name in three) / 3
    return out


def best_beta(bed: Bed, method: object, grid: tuple[float, ...]) -> float:
    """Choose beta on validation data with alpha by the norm rule; return the test score.

    The scaled update is affine in beta, so two merges give all of the grid.
    """
    low = bed.update(MERGERS.build("lines", {"of": method, "beta": 0.0}))
    high = bed.update(MERGERS.build("lines", {"of": method, "beta": 1.0}))
    tried = []
    for beta in grid:
        update = {name: low[name] + beta * (high[name] - low[name]) for name in low}
        state = bed.at(update, 1.0)
        tried.append((bed.score(state, "val"), -beta, state))
    return bed.score(max(tried, key=lambda one: one[:2])[2])

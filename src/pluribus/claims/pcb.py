"""PCB-Merging: competition between parameters gives a better training-free merge than TIES."""

import torch

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import DATA, METRIC, MODEL, Bed, merge8
from pluribus.claims.ties import ties
from pluribus.core.registry import MERGERS
from pluribus.engine.driver import merge_tensors

SCALES = tuple(round(0.6 + 0.2 * i, 1) for i in range(9))  # 0.6 ... 2.2
RATIOS = (0.05, 0.1, 0.2)

CLAIM = Claim(
    name="pcb",
    title="Parameter competition balancing beats TIES at the same cost",
    paper="arXiv:2410.02396",
    data=DATA,
    model=MODEL,
    metric=METRIC,
    checks=(
        Check(text="PCB tuned over TIES (mean) tuned", left="pcb", right="ties_mean", margin=0.5),
        Check(text="PCB tuned over TIES (sum) tuned", left="pcb", right="ties_sum", margin=0.5),
        Check(
            text="PCB tuned over task arithmetic tuned",
            left="pcb",
            right="task_arithmetic",
            margin=-1.0,
        ),
        Check(
            text="planted: coefficient on each expert's important block",
            left="planted_own",
            margin=90.0,
            each=True,
        ),
        Check(
            text="planted: conflicts that go to the heavier side",
            left="planted_conflict",
            margin=90.0,
            each=True,
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    bed = merge8(seed, on_step)
    plain = MERGERS.build("task_arithmetic", {"weight": 1.0})
    out = {
        "pcb": tuned(bed),
        "ties_mean": bed.tuned(ties(), [round(0.8 + 0.1 * i, 1) for i in range(18)]),
        "ties_sum": bed.tuned(ties(agg="sum")),
        "task_arithmetic": bed.tuned(plain),
    }
    return {**out, **planted(seed)}


def tuned(bed: Bed) -> float:
    """Choose ratio and scale on validation data; return the test score."""
    tried = []
    for ratio in RATIOS:
        update = bed.update(MERGERS.build("pcb", {"ratio": ratio, "lambda": 1.0}))
        _, state = bed.best_scale(update, SCALES)
        tried.append((bed.score(state, "val"), -ratio, state))
    return bed.score(max(tried, key=lambda one: one[:2])[2])


def planted(seed: int, size: int = 3000) -> dict[str, float]:
    """Two experts with an important block each, and a block where they pull apart."""
    draw = torch.Generator().manual_seed(seed)
    third = size // 10
    taus = 1e-4 * torch.randn(2, size, generator=draw)
    jitter = 1 + 0.05 * torch.rand(2, size, generator=draw)
    taus[0, :third] = 0.1 * jitter[0, :third]
    taus[1, third : 2 * third] = 0.1 * jitter[1, third : 2 * third]
    fight = slice(2 * third, 3 * third)
    taus[0, fight], taus[1, fight] = 0.1 * jitter[0, fight], -0.04 * jitter[1, fight]
    base = {"w": torch.zeros(size)}
    method = MERGERS.build("pcb", {"ratio": 0.3, "lambda": 1.0})
    merged = merge_tensors(base, [{"w": tau} for tau in taus], method)["w"]
    own = torch.cat([merged[:third] / taus[0, :third], (merged / taus[1])[third : 2 * third]])
    heavier = (merged[fight].sign() == taus[0, fight].sign()).float().mean()
    return {"planted_own": 100 * float(own.mean()), "planted_conflict": 100 * float(heavier)}

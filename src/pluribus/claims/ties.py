"""TIES beats averaging untuned; it removes interference that averaging keeps (planted, exact)."""

import torch

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import DATA, GRID, METRIC, MODEL, merge8
from pluribus.core.registry import MERGERS
from pluribus.engine.driver import merge_tensors

CLAIM = Claim(
    name="ties",
    title="TIES resolves interference between experts without tuning",
    paper="arXiv:2306.01708",
    data=DATA,
    model=MODEL,
    metric=METRIC,
    checks=(
        Check(
            text="TIES (density 0.2, lambda 1, untuned) over the plain average",
            left="ties",
            right="average",
            margin=3.0,
        ),
        Check(
            text="planted: share of signs right on the support",
            left="planted_signs",
            margin=100.0,
            each=True,
        ),
        Check(
            text="planted: size kept on flipped coordinates, over the average's",
            left="planted_size",
            right="planted_size_average",
            margin=20.0,
            each=True,
        ),
        Check(
            text="entries below the threshold do not matter (max change, TIES)",
            left="below_threshold_ties",
            margin=0.0,
            at_most=True,
            each=True,
        ),
        Check(
            text="TIES tuned over task arithmetic tuned",
            left="ties_tuned",
            right="task_arithmetic_tuned",
            asserted=False,
        ),
        Check(
            text="TIES (sum) tuned over task arithmetic tuned",
            left="ties_sum_tuned",
            right="task_arithmetic_tuned",
            asserted=False,
        ),
    ),
)


def ties(**parameters: object) -> object:
    """The paper's whole-model form."""
    return MERGERS.build(
        "ties",
        {"density": 0.2, "scope": "model", "tie": "global", "count": "official", **parameters},
    )


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    bed = merge8(seed, on_step)
    out = {
        "average": bed.score(bed.merged(MERGERS.build("linear", {}))),
        "ties": bed.score(bed.merged(ties())),
        "ties_tuned": bed.tuned(ties(), [round(0.8 + 0.1 * i, 1) for i in range(18)]),
        "ties_sum_tuned": bed.tuned(ties(agg="sum"), GRID),
        "task_arithmetic_tuned": bed.tuned(MERGERS.build("task_arithmetic", {"weight": 1.0})),
    }
    return {**out, **planted(seed), **below_threshold(seed)}


def planted(seed: int, experts: int = 6, size: int = 4000) -> dict[str, float]:
    """Experts share a sparse signal of one sign; one has it flipped on a third of the support."""
    draw = torch.Generator().manual_seed(seed)
    support = torch.randperm(size, generator=draw)[: size // 10]
    signal = torch.zeros(size)
    signal[support] = torch.where(torch.rand(len(support), generator=draw) < 0.5, -1.0, 1.0)
    taus = signal + 0.05 * torch.randn(experts, size, generator=draw) * (signal == 0)
    flipped = support[: len(support) // 3]
    taus[int(torch.randint(experts, (1,), generator=draw)), flipped] *= -1
    base = {"w": torch.zeros(size)}
    pool = [{"w": tau} for tau in taus]
    merged = merge_tensors(base, pool, ties(density=0.1, count="exact"))["w"]
    average = merge_tensors(base, pool, MERGERS.build("linear", {}))["w"]
    right = (merged[support].sign() == signal[support].sign()).float().mean()
    return {
        "planted_signs": 100 * float(right),
        "planted_size": 100 * float(merged[flipped].abs().mean()),
        "planted_size_average": 100 * float(average[flipped].abs().mean()),
    }


def below_threshold(seed: int) -> dict[str, float]:
    """Flip a fifth of the signs below each expert's threshold: TIES must not notice."""
    draw = torch.Generator().manual_seed(seed + 1)
    taus = torch.randn(4, 5000, generator=draw)
    cut = taus.abs().sort(dim=1, descending=True).values[:, 1000:1001]
    low = taus.abs() < cut
    flip = low & (torch.rand(taus.shape, generator=draw) < 0.2)
    changed = torch.where(flip, -taus, taus)
    base = {"w": torch.zeros(5000)}
    moved = {}
    for name, method in (("ties", ties()), ("average", MERGERS.build("linear", {}))):
        one = merge_tensors(base, [{"w": tau} for tau in taus], method)["w"]
        two = merge_tensors(base, [{"w": tau} for tau in changed], method)["w"]
        moved[f"below_threshold_{name}"] = float((one - two).abs().max())
    return moved

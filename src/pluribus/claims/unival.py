"""UnIVAL: interpolating two fine-tunes of one base serves both tasks, and a third, unseen one."""

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import DATA, MODEL, merge8
from pluribus.core.registry import MERGERS

LAMBDAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)

CLAIM = Claim(
    name="unival",
    title="A point between two fine-tunes is better than both on both tasks",
    paper="arXiv:2307.16184, section 5",
    data=DATA,
    model=MODEL,
    metric="accuracy, percent",
    checks=(
        Check(
            text="best inner point over the better end, mean of both tasks",
            left="inner_mean",
            right="end_mean",
            margin=3.0,
        ),
        Check(
            text="a third task nobody trained on: best inner point over the better end",
            left="inner_unseen",
            right="end_unseen",
        ),
    ),
)


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Walk from the first to the second task's expert; the third task is the unseen one."""
    bed = merge8(seed, on_step)
    first, second, unseen = bed.tasks[:3]
    means, others = [], []
    out: dict[str, float] = {}
    for share in LAMBDAS:
        method = MERGERS.build("linear", {"weight": (share, 1 - share)})
        state = bed.merged(method, [first, second])
        scores = [100 * bed.zoo.score(state, task) for task in (first, second, unseen)]
        means.append(sum(scores[:2]) / 2)
        others.append(scores[2])
        out |= {f"mean_at_{share:g}": means[-1], f"unseen_at_{share:g}": others[-1]}
    out |= {"inner_mean": max(means[1:-1]), "end_mean": max(means[0], means[-1])}
    out |= {"inner_unseen": max(others[1:-1]), "end_unseen": max(others[0], others[-1])}
    return out

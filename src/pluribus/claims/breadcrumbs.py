"""Breadcrumbs: hyper-parameters found on few tasks serve many; sparse updates merge better."""

from collections.abc import Sequence

import torch

from pluribus.claims import Check, Claim, OnStep
from pluribus.claims._bed import DATA, METRIC, MODEL, Bed, State, merge8
from pluribus.core.registry import MERGERS

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
BANDS = ((0.1, 0.006), (0.15, 0.006), (0.2, 0.006), (0.2, 0.02))

CLAIM = Claim(
    name="breadcrumbs",
    title="Sparse masks make merging transfer to more tasks without new tuning",
    paper="arXiv:2312.06795",
    data=DATA,
    model=MODEL,
    metric=METRIC,
    checks=(
        Check(
            text="tuned on 3 tasks, applied at 8: breadcrumbs over task arithmetic",
            left="breadcrumbs_t8",
            right="task_arithmetic_t8",
            margin=0.5,
        ),
        Check(
            text="tuned on 3 tasks: sizes (of 3 ... 8) at which breadcrumbs is better",
            left="sizes_won",
            margin=5.0,
        ),
        Check(
            text="rows, density 0.2, gamma 0.02, scale tuned: over dense task arithmetic tuned",
            left="breadcrumbs_tuned",
            right="task_arithmetic_tuned",
        ),
        Check(
            text="mean |cosine| between experts falls",
            left="cosine_dense",
            right="cosine_sparse",
            asserted=True,
        ),
        Check(
            text="density 0.15, gamma 0.006, tuned: over task arithmetic tuned",
            left="breadcrumbs_015_tuned",
            right="task_arithmetic_tuned",
            asserted=False,
        ),
        Check(
            text="per tensor instead of per row: over task arithmetic tuned",
            left="breadcrumbs_tensor_tuned",
            right="task_arithmetic_tuned",
            asserted=False,
        ),
    ),
)


def crumbs(density: float, gamma: float, scope: str = "row") -> object:
    """One setting, at weight 1."""
    return MERGERS.build(
        "breadcrumbs", {"density": density, "gamma": gamma, "scope": scope, "weight": 1.0}
    )


def measure(seed: int, on_step: OnStep | None = None) -> dict[str, float]:
    """Return all figures for one seed."""
    bed = merge8(seed, on_step)
    plain = MERGERS.build("task_arithmetic", {"weight": 1.0})
    out = {
        "task_arithmetic_tuned": bed.tuned(plain),
        "breadcrumbs_tuned": bed.tuned(crumbs(0.2, 0.02)),
        "breadcrumbs_015_tuned": bed.tuned(crumbs(0.15, 0.006)),
        "breadcrumbs_tensor_tuned": bed.tuned(crumbs(0.2, 0.02, "tensor")),
        "cosine_dense": cosine(bed, plain),
        "cosine_sparse": cosine(bed, crumbs(0.2, 0.02)),
    }
    return {**out, **growing(bed, plain)}


def growing(bed: Bed, plain: object) -> dict[str, float]:
    """Tune on the first three tasks, then add the others one by one with the same values."""
    few = bed.tasks[:3]
    alpha, _ = bed.best_scale(bed.update(plain, few), SCALES, few)
    tried = []
    for band in BANDS:
        scale, state = bed.best_scale(bed.update(crumbs(*band), few), SCALES, few)
        tried.append((bed.score(state, "val", few), band, scale))
    _, band, scale = max(tried, key=lambda one: one[0])
    out: dict[str, float] = {"chosen_density": band[0], "chosen_gamma": band[1]}
    won = 0
    for count in range(3, len(bed.tasks) + 1):
        used = bed.tasks[:count]
        dense = bed.score(bed.at(bed.update(plain, used), alpha))
        sparse = bed.score(bed.at(bed.update(crumbs(*band), used), scale))
        out |= {f"task_arithmetic_t{count}": dense, f"breadcrumbs_t{count}": sparse}
        won += sparse > dense
    return {**out, "sizes_won": won}


def cosine(bed: Bed, method: object) -> float:
    """Return the mean |cosine| between single experts' updates under a method, times 100."""
    updates = [_flat(bed.update(method, [task])) for task in bed.tasks]
    values = [
        torch.nn.functional.cosine_similarity(one, other, dim=0).abs()
        for i, one in enumerate(updates)
        for other in updates[:i]
    ]
    return 100 * float(torch.stack(values).mean())


def _flat(update: State) -> torch.Tensor:
    parts: Sequence[torch.Tensor] = [update[name].reshape(-1) for name in sorted(update)]
    return torch.cat(list(parts))

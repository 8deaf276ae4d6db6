"""Which blocks of which task vectors to keep: a few at each position, chosen before training.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, section 5 and appendix (no
released code).

    score[t, j] = |dL/dc[t, j]| at c = 0  =  |<dL/dtheta_j, tau_tj>|

so one forward and backward pass through the base scores every block of every task vector. With
several groups of coordinates the score is the sum over groups.
"""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from pluribus.core.errors import InputError
from pluribus.core.random import key
from pluribus.tune._blend import Blend, Leaves
from pluribus.tune._fit import Problem, blame


def block_scores(problem: Problem, leaves: Leaves) -> Tensor:
    """Return the scores by row and expert, (r, t), from one batch of every task.

    `leaves` are the merged tensors of `problem.blend`; their gradients are dropped afterwards.
    Raises NonFiniteError if the base's gradient is not finite.
    """
    terms = problem.backward(leaves, problem.batches(1))
    problem.blend.pull(leaves)
    slopes = problem.blend.coefficients.grad
    assert slopes is not None
    if not bool(slopes.isfinite().all()):
        raise blame(problem.blend, leaves, terms, 0)
    problem.blend.coefficients.grad = None
    for leaf in leaves.values():
        leaf.grad = None
    return slopes.abs().sum(-1)


def greatest(blend: Blend, scores: Tensor, budget: int) -> dict[str, tuple[int, ...]]:
    """Return the `budget` best experts of each tensor; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(1).values.tolist()
    return {name: tuple(order[row]) for name, row in blend.tensors.items()}


def drawn(blend: Blend, budget: int, seed: int) -> dict[str, tuple[int, ...]]:
    """Return `budget` experts of each tensor, drawn from the seed and the tensor's name."""
    out = {}
    for name in blend.tensors:
        rng = Generator().manual_seed(key(seed, name, "budget"))
        out[name] = tuple(
            sorted(torch.randperm(len(blend.experts), generator=rng)[:budget].tolist())
        )
    return out


def check_budget(budget: int, experts: Mapping[str, object]) -> None:
    """Raise InputError for more blocks than there are experts."""
    if budget > len(experts):
        raise InputError(
            f"atlas: budget = {budget}, but there are {len(experts)} experts: at most that many "
            "blocks can be kept at a position"
        )

"""The gradient that AdamW gets: pulled, with a penalty's, and clipped; and a rate that fits it.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, appendix.

    penalty = 1/2 mean_j |c[j]|_p        over experts, p = 1 or 2
    rate    = 0.1 (median |theta0_j| / |tau_tj|) / 100, held within [0.001, 0.1]         (ours)
"""

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from pluribus.core.errors import InputError
from pluribus.tune._blend import Blend, Leaves
from pluribus.tune._fit import Problem
from pluribus.tune._streams import Batch


class Clipped:
    """Sets the coefficients' gradient, its norm at most `clip`; skips a step without sure guess."""

    def __init__(self, problem: Problem, clip: float, penalty: int, epoch: int) -> None:
        self.problem, self.clip, self.penalty, self.epoch = problem, clip, penalty, epoch
        self._seen = self._empty = 0

    def __call__(self, leaves: Leaves, batches: Sequence[Batch]) -> bool:
        """Return whether there is a step to take. Raises InputError if an epoch had none."""
        coefficients = self.problem.blend.coefficients
        self.problem.blend.pull(leaves)
        slopes = coefficients.grad
        assert slopes is not None
        self._seen += 1
        nothing = self.problem.wants == "guesses" and not bool(slopes.any())
        self._empty += nothing
        if self._seen % self.epoch == 0:
            if self._empty == self.epoch:
                raise InputError(
                    f"an epoch of {self.epoch} batches held no guess that was sure enough: there "
                    "is nothing to learn from. Try a lower threshold, or threshold='adaptive'"
                )
            self._empty = 0
        if nothing:
            return False
        if self.penalty:
            raw = coefficients.detach().requires_grad_()
            slopes += torch.autograd.grad(penalty(raw, self.penalty), raw)[0]
        torch.nn.utils.clip_grad_norm_([coefficients], self.clip)
        return True


def penalty(coefficients: Tensor, p: int) -> Tensor:
    """Return half the mean over blocks of the norm over experts: (r, t, g) -> ()."""
    return 0.5 * torch.linalg.vector_norm(coefficients, p, dim=1).mean()


def auto_lr(blend: Blend) -> float:
    """Return the rate that fits the task vectors' lengths.

    Blocks that are zero in the base or the task vector don't count.
    """
    ratios = []
    for name in blend.tensors:
        own = float(blend._base[name].norm())
        lengths = blend.task_vectors(name).norm(dim=1).tolist()
        ratios += [own / length for length in lengths if length > 0 and own > 0]
    return min(max(1e-3 * median(ratios), 1e-3), 0.1) if ratios else 0.1

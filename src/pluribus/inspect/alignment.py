"""Do tasks pull shared parameters the same way? Mean cosine of their gradients.

    alignment = mean over pairs (t, t') of cosine(grad L_t, grad L_t')

over one batch of each task at the same point; 1: one direction, 0: unrelated, below: conflict.
Caccia et al., NeurIPS 2023 (https://arxiv.org/abs/2211.03831), section 5, take the adapters'
gradients; which layers and steps they average is not known, here all given parameters count as one
vector at one point.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pluribus.core.errors import InputError, NonFiniteError, listing
from pluribus.core.shapes import Float


@dataclass(frozen=True, eq=False)
class Alignment:
    """Cosines of all tasks' gradients (t, t), their lengths (t,), and the mean over pairs."""

    tasks: tuple[str, ...]
    cosines: Float[Tensor, "t t"]
    norms: Float[Tensor, " t"]

    @property
    def mean(self) -> float:
        """The mean over all pairs of different tasks."""
        count = len(self.tasks)
        total = self.cosines.sum() - self.cosines.diagonal().sum()
        return float(total) / (count * (count - 1))

    @property
    def conflicts(self) -> float:
        """The share of pairs with a negative cosine."""
        rows, columns = torch.triu_indices(len(self.tasks), len(self.tasks), 1)
        return float((self.cosines[rows, columns] < 0).double().mean())


def gradient_alignment(
    losses: Mapping[str, Callable[[], Float[Tensor, ""]]], parameters: Iterable[Tensor]
) -> Alignment:
    """Return how the tasks' gradients of some shared parameters agree.

    `losses` are functions without arguments that give a task's loss; each is called once, and no
    parameter's `.grad` is touched. Raises InputError for fewer than two tasks or a task that none
    of the parameters moves, NonFiniteError for a gradient that is not finite.
    """
    if len(losses) < 2:
        raise InputError(f"{len(losses)} task(s) given; an alignment needs at least two")
    shared = list(parameters)
    if frozen := [str(i) for i, one in enumerate(shared) if not one.requires_grad]:
        raise InputError(f"parameters number {listing(frozen)} are frozen; give those that train")
    if not shared:
        raise InputError("no parameter is given; give those that the tasks share")
    rows = []
    for task, loss in losses.items():
        found = torch.autograd.grad(loss(), shared, allow_unused=True)
        pieces = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, shared, strict=True)
        ]
        row = torch.cat([piece.detach().double().flatten() for piece in pieces])
        if not bool(row.isfinite().all()):
            raise NonFiniteError(f"the gradient of task {task!r} is not finite")
        rows.append(row)
    table = torch.stack(rows)
    norms = table.norm(dim=1)
    if bool((norms == 0).any()):
        still = [task for task, norm in zip(losses, norms.tolist(), strict=True) if not norm]
        raise InputError(
            f"the gradient of {listing(still)} is zero, and has no direction: does the loss depend "
            "on these parameters?"
        )
    unit = table / norms[:, None]
    return Alignment(tuple(losses), unit @ unit.T, norms)

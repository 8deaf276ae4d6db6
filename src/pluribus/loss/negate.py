"""Negation: unlearn some tasks while a control task is held.

Zhang et al., aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, section 4.1.

    loss = - CE_target + CE_control

Called on outputs and labels it is -CE, what a task to forget adds to the loss; `share` is the sign
of each task's own CE. It has no lower bound: something must stop it, as `Atlas` does once the
control's accuracy is below `floor` times the base's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pluribus.core.errors import InputError, nearest
from pluribus.core.merger import Fraction
from pluribus.loss import loss
from pluribus.loss.cross_entropy import CrossEntropy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@loss("negate", paper="arXiv:2407.02880", needs="labels")
@dataclass(frozen=True, kw_only=True)
class Negate:
    """Minus the cross-entropy, and plus that of a control task."""

    control: str = ""  # the task whose inputs are the control's
    floor: Fraction = 0.95  # of the base's accuracy on the control, that must be left

    def __call__(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the loss of a task to forget, (). Raises InputError as CrossEntropy does."""
        return -CrossEntropy()(outputs, targets)

    def shares(self, tasks: "Iterable[str]") -> dict[str, float]:
        """Return the factor of each task's cross-entropy: 1 for the control, -1 for the others.

        Raises InputError without a control among the tasks, or with nothing else.
        """
        tasks = list(tasks)
        if not self.control:
            raise InputError(
                "negation without a control forgets everything: give batches of what must be "
                "kept, and name their task: Negate(control='...')"
            )
        if self.control not in tasks:
            raise InputError(
                f"negation's control {self.control!r} has no stream; tasks: {', '.join(tasks)}."
                f"{nearest(self.control, tasks)}"
            )
        if len(tasks) == 1:
            raise InputError(f"there is no task to forget beside the control {self.control!r}")
        return {task: 1.0 if task == self.control else -1.0 for task in tasks}

"""Divergence from each task's own expert: the merged model learns to answer as it does.

Needs no label: the experts are at hand (knowledge distillation, Hinton et al., 2015,
https://arxiv.org/abs/1503.02531, section 2).

    loss = T^2 mean_b KL(q_b || p_b),    q = softmax(expert / T),  p = softmax(outputs / T)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pluribus.core.errors import MismatchError
from pluribus.core.merger import Positive
from pluribus.loss import logits_of, loss

if TYPE_CHECKING:
    from torch import Tensor


@loss("kl", paper="arXiv:1503.02531", needs="experts")
@dataclass(frozen=True, kw_only=True)
class Kl:
    """Mean divergence from the experts' predictions."""

    temperature: Positive = 1.0

    def __call__(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the loss, (). Raises MismatchError if the expert's scores have another shape."""
        outputs, targets = logits_of(outputs), logits_of(targets)
        if outputs.shape != targets.shape:
            raise MismatchError(
                f"the merged model's scores are {list(outputs.shape)}, its expert's "
                f"{list(targets.shape)}"
            )
        wanted = (targets / self.temperature).log_softmax(-1)
        logs = (outputs / self.temperature).log_softmax(-1)
        return self.temperature**2 * (wanted.exp() * (wanted - logs)).sum(-1).mean()

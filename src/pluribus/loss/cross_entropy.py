"""Cross-entropy with the true labels: the supervised objective.

loss = mean_b  - ln softmax(outputs)_b[label_b]
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pluribus.core.errors import InputError
from pluribus.core.merger import Share
from pluribus.loss import logits_of, loss

if TYPE_CHECKING:
    from torch import Tensor


@loss("cross_entropy", needs="labels")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Mean negative log-likelihood of the labels."""

    smoothing: Share = 0.0  # share of the probability spread over all classes

    def __call__(self, outputs: "Tensor", targets: "Tensor") -> "Tensor":
        """Return the loss, (). Raises InputError for labels that are no class."""
        from torch.nn.functional import cross_entropy

        outputs = logits_of(outputs)
        if targets.shape != outputs.shape[:1]:
            raise InputError(
                f"{list(targets.shape)} labels for {list(outputs.shape)} scores: give one class "
                "index for each input"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise InputError(
                f"labels go from {low} to {high}, but the model has {outputs.shape[1]} classes"
            )
        return cross_entropy(outputs, targets, label_smoothing=self.smoothing)

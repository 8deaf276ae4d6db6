"""Entropy of the predictions, averaged over the batch: small where a model is sure of itself.

Yang et al., AdaMerging, ICLR 2024, https://arxiv.org/abs/2310.02575, section 3.2.

    H = mean_b  - sum_v p_bv ln p_bv,      p = softmax(outputs)
    loss = H - diversity * H(mean_b p)

From log-softmax, without an epsilon inside the logarithm (FusionBench adds 1e-8). A model can also
become sure by naming one class for every input; `diversity` > 0 (ours, default 0) pays for using
several.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pluribus.core.merger import NonNegative
from pluribus.loss import logits_of, loss

if TYPE_CHECKING:
    from torch import Tensor


def entropy(outputs: "Tensor") -> "Tensor":
    """Return the entropy of each row's softmax in nats: (b, v) -> (b,)."""
    logs = outputs.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


@loss("entropy", paper="arXiv:2310.02575")
@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Mean entropy of the predictions."""

    diversity: NonNegative = 0.0  # weight of the entropy of the batch's mean prediction

    def __call__(self, outputs: "Tensor", targets: Any = None) -> "Tensor":
        """Return the loss, (). Raises InputError unless the outputs are (b, v)."""
        import torch

        outputs = logits_of(outputs)
        mean = entropy(outputs).mean()
        if not self.diversity:
            return mean
        used = torch.logsumexp(outputs.log_softmax(-1), 0, keepdim=True)  # unnormalised mean
        return mean - self.diversity * entropy(used).squeeze(0)

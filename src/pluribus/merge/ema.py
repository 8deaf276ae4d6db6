"""Exponential moving average over checkpoints of one run, oldest first.

Polyak and Juditsky 1992; as a merge of saved checkpoints, e.g. https://arxiv.org/abs/2306.03241.

    m_1 = theta_1,   m_i = decay m_{i-1} + (1 - decay) theta_i                  (n,)

The equal-weight running average (SWA) is `linear` with its default weights. Cost: one pass.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import Share, merger


@merger("ema", paper="arXiv:2306.03241", base="ignored", ordered=True)
@dataclass(frozen=True, kw_only=True)
class Ema:
    """Moving average in the order of the experts."""

    decay: Share = 0.9  # share of the average that survives each checkpoint

    def __call__(self, base: Array | None, experts: Float[Array, "t n"]) -> Float[Array, " n"]:
        """Merge one block."""
        mean = experts[0]
        for expert in experts[1:]:
            mean = mean + (1.0 - self.decay) * (expert - mean)
        return mean

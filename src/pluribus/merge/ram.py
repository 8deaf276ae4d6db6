"""Reinforced Agent Merging: average an update over the experts that made one.

https://arxiv.org/abs/2601.13572; mergekit `ram`.

    touched_t = |theta_t - theta_0| > epsilon                                                (t, n)
    theta     = theta_0 + sum over touched_t of (theta_t - theta_0) / number of touched_t    (n,)

An element that one expert changed gets its whole update, one that several changed their mean, and
smaller changes count as none. One pass.
"""

from dataclasses import dataclass

from pluribus.core.arrays import Array, Float
from pluribus.core.merger import NonNegative, merger
from pluribus.core.sparse import add_up


@merger("ram", paper="arXiv:2601.13572")
@dataclass(frozen=True, kw_only=True)
class Ram:
    """Mean over the experts that changed an element."""

    epsilon: NonNegative = 1e-5  # a change up to this is none

    def __call__(
        self, base: Float[Array, " n"], experts: Float[Array, "t n"]
    ) -> Float[Array, " n"]:
        """Merge one block."""
        tau = experts - base
        touched = abs(tau) > self.epsilon
        return base + add_up(shared_mean(tau, touched))


def shared_mean(tau: Array, touched: Array) -> Array:
    """Touched updates, each divided by how many touched its element, (t, n)."""
    kept = tau * touched
    owners = kept[0] * 0
    for row in touched:
        owners = owners + row
    return kept / (owners + (owners == 0))

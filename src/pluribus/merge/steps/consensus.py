"""Keep the merged update only where at least `k` experts need it (Consensus Merging).

Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813, sections 4 and 5.

    m_t = 1[|tau_t| > mask_lambda_t |update - tau_t|]     tau_t = theta_t - theta_0     (t, n)
    update where sum_t m_t >= k, else 0                                                 (n,)

k = 2 drops what no expert needs (catastrophic) and what one alone needs (selfish); k = 1 the first
only; k = 0 nothing. Masks are computed against the update that arrives here, which should be
unscaled: put `scale` behind this step.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pluribus.core.arrays import Array, Bool, Float, column
from pluribus.core.chain import step
from pluribus.core.errors import InputError
from pluribus.core.merger import NonNegative


def tall_mask(
    tau: Float[Array, "t *n"],
    update: Float[Array, "*n"],
    mask_lambda: float | tuple[float, ...],
) -> Bool[Array, "t *n"]:
    """Return where each expert's own update outweighs what the merged one gets wrong about it."""
    return abs(tau) > column(mask_lambda, tau) * abs(update[None] - tau)


@step("consensus", kind="update", paper="arXiv:2405.07813")
@dataclass(frozen=True, kw_only=True)
class Consensus:
    """Agreement of masks."""

    k: Annotated[int, Ge(0)] = 2
    mask_lambda: NonNegative | tuple[NonNegative, ...] = 0.4  # one, or one for each expert

    def __call__(
        self, values: Float[Array, "1 *n"], *, base: Array, experts: Array
    ) -> Float[Array, "1 *n"]:
        """Mask one block. Raises InputError if no coordinate could have k experts."""
        count = experts.shape[0]
        if self.k > count:
            raise InputError(
                f"consensus: k = {self.k} experts must need a coordinate, but there are {count}: "
                f"everything would be removed; give k from 0 to {count}"
            )
        masks = tall_mask(experts - base, values[0], self.mask_lambda)
        needed = values[0] * 0
        for mask in masks:
            needed = needed + mask
        return values * (needed >= self.k)

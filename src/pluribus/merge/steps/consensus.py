"""Keep the merged update only where at least `k` experts need it (Consensus Merging).

Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813, sections 4 and 5.

    m_t = 1[|theta_0 - theta_t| > mask_lambda_t |theta_0 + update - theta_t|]     (t, n)
    update where sum_t m_t >= k, else 0                                           (n,)

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
    base: Float[Array, "..."],
    experts: Float[Array, "t ..."],
    update: Float[Array, "..."],
    mask_lambda: float | tuple[float, ...],
) -> Bool[Array, "t ..."]:
    """Return where the base is further from each expert than the merged model, times lambda.

    Written in whole weights, as the authors' code is, so that the bits are theirs.
    """
    return abs(base - experts) > abs((base + update) - experts) * column(mask_lambda, experts)


@step("consensus", kind="update", paper="arXiv:2405.07813")
@dataclass(frozen=True, kw_only=True)
class Consensus:
    """Agreement of masks."""

    k: Annotated[int, Ge(0)] = 2
    mask_lambda: NonNegative | tuple[NonNegative, ...] = 0.4  # one, or one for each expert

    def __call__(
        self, values: Float[Array, "1 ..."], *, base: Array, experts: Array
    ) -> Float[Array, "1 ..."]:
        """Mask one block. Raises InputError if no coordinate could have k experts."""
        count = experts.shape[0]
        if self.k > count:
            raise InputError(
                f"consensus: k = {self.k} experts must need a coordinate, but there are {count}: "
                f"everything would be removed; give k from 0 to {count}"
            )
        masks = tall_mask(base, experts, values[0], self.mask_lambda)
        needed = values[0] * 0
        for mask in masks:
            needed = needed + mask
        return values * (needed >= self.k)

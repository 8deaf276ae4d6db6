"""Consensus Merging: drop from a merged update what fewer than `k` experts need.

Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813, section 5.

    tau   = what `multi` adds to the base, unscaled                                  (n,)
    m_t   = 1[|theta_0 - theta_t| > mask_lambda_t |theta_0 + tau - theta_t|]         (t, n)
    theta = theta_0 + scale tau where sum_t m_t >= k, else theta_0                   (n,)

`multi` is "task_arithmetic" (sum of the task vectors), "ties" (trimmed to 20 %, elected, summed, as
the paper's masks use it), or any merger, chain or `{merge_method, parameters}`. `scale` is tuned
over 0.1 ... 1.0 in the paper. Masks are computed on the fly against the update that is merged, so
none can be stale.

Cost: one pass, and those of `multi`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from annotated_types import Ge

from pluribus.core.arrays import Array, Float
from pluribus.core.chain import Chain, as_merger
from pluribus.core.merger import FACTS, At, NonNegative, Stage, facts, merger
from pluribus.merge.steps.consensus import Consensus as Mask
from pluribus.merge.steps.elect import Elect
from pluribus.merge.steps.scale import Scale
from pluribus.merge.steps.sum import Sum
from pluribus.merge.steps.trim import Trim

UPDATES = {
    "task_arithmetic": Chain.of(Sum()),
    "ties": Chain.of(Trim(density=0.2, scope="model", count="official"))
    >> Elect(tie="global")
    >> Sum(),
}


def multi_task(what: Any) -> Any:
    """Return the merger whose unscaled update `what` names, as masks are computed against it."""
    return UPDATES[what] if isinstance(what, str) and what in UPDATES else as_merger(what)


@merger("consensus", paper="arXiv:2405.07813")
@dataclass(frozen=True, kw_only=True)
class Consensus:
    """A merged update where enough experts agree that it is needed."""

    multi: Any = "task_arithmetic"
    k: Annotated[int, Ge(0)] = 2  # experts that must need a coordinate
    mask_lambda: NonNegative | tuple[NonNegative, ...] = 0.4  # one, or one for each expert
    scale: float = 0.3  # lambda, alpha in the paper

    def check(self) -> None:
        """Build the inner method, and take over its facts. Raises RecipeError or InputError."""
        object.__setattr__(self, "multi", multi_task(self.multi))
        inner, own = facts(self._chain), facts(type(self))
        object.__setattr__(
            self, FACTS, replace(inner, name=own.name, paper=own.paper, summary=own.summary)
        )

    @cached_property
    def _chain(self) -> Chain:
        mask = Mask(k=self.k, mask_lambda=self.mask_lambda)
        return Chain.of(self.multi) >> mask >> Scale(scale=self.scale)

    def folds(self) -> Sequence[Stage]:
        """Ask for the inner method's folds."""
        return self._chain.folds()

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At, **folded: Any
    ) -> Float[Array, "..."]:
        """Merge one block. Raises InputError if k exceeds the number of experts."""
        return self._chain(base, experts, at=at, **folded)

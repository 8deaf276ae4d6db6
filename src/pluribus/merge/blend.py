"""Learned blend: add the experts' updates with the coefficients and masks that tuning found.

Yang et al., AdaMerging, ICLR 2024, https://arxiv.org/abs/2310.02575, section 3.2; Zhang et al.,
aTLAS, NeurIPS 2024, https://arxiv.org/abs/2407.02880, section 3; Tang et al., Concrete,
https://arxiv.org/abs/2312.06173, section 3.

    theta_j = theta0_j + m_j * sum_t c_j[t, g] tau_tj        for tensor j      (n,)

`of` are steps that the task vectors tau pass first: "trim(density=0.2, scope='model',
count='official') >> elect(tie='global')" gives AdaMerging++. `file` is the coefficients.safetensors
of `pluribus tune`; without one every coefficient is `scale`, which is task arithmetic.

`pluribus tune` writes such a recipe beside its model: merging it again needs no data and gives the
same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pluribus.core.arrays import Array, Float
from pluribus.core.chain import Chain, parse
from pluribus.core.merger import At, Beside, Stage, merger
from pluribus.merge.steps.blend import Blend as BlendStep


@merger("blend", paper="arXiv:2310.02575")
@dataclass(frozen=True, kw_only=True)
class Blend:
    """Sum of updates with learned coefficients."""

    file: Beside = ""
    digest: str = ""  # of the file's contents; a changed file is refused
    scale: float = 0.3  # every coefficient, if there is no file
    of: str = ""  # steps before the sum; the chain's text

    def check(self) -> None:
        """Read the steps. Raises RecipeError or InputError."""
        _ = self._chain

    @cached_property
    def _chain(self) -> Chain:
        last = BlendStep(file=self.file, digest=self.digest, scale=self.scale)
        return (parse(self.of) >> last) if self.of else Chain((last,))

    def folds(self) -> Sequence[Stage]:
        """Ask for what the steps ask for."""
        return self._chain.folds()

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At, **folded: Any
    ) -> Float[Array, "..."]:
        """Merge one block."""
        return self._chain(base, experts, at=at, **folded)

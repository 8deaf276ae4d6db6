"""Scale an update linearly with depth: little in shallow layers, much in deep ones (LiNeS).

Wang et al., ICLR 2025, https://arxiv.org/abs/2410.17146, section 4.

    scale(l) = alpha + beta f(l / (L - 1)),  block l of L; alpha outside the blocks
    alpha    = (1/T) ||sum_t tau_t||_1 / ||update||_1  over the whole model, unless given

`tail="deep"` gives what follows the blocks (final norm, head) alpha + beta, where the authors' code
gives alpha. `schedule` is f: x, x^2 or sqrt(x). `norm_over` is a regular expression: only tensors
whose names it finds count in the norms (an LLM's embedding can dominate them).
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pluribus.core.arrays import Array, Float, like
from pluribus.core.chain import step
from pluribus.core.depth import is_tail
from pluribus.core.errors import InputError
from pluribus.core.fold import Sum
from pluribus.core.merger import At, Stage
from pluribus.core.sparse import add_up

Schedule = Literal["linear", "quadratic", "sqrt"]
Tail = Literal["alpha", "deep"]
_CURVES = {"linear": lambda x: x, "quadratic": lambda x: x * x, "sqrt": lambda x: x**0.5}


def scale_at(
    layer: int | None,
    layers: int,
    name: str,
    alpha: float,
    beta: float,
    tail: Tail = "alpha",
    schedule: Schedule = "linear",
) -> float:
    """Return the factor of one tensor. Raises InputError for fewer than two blocks."""
    if layers < 2:
        raise InputError(
            f"lines: the model has {layers} numbered blocks, and a schedule over depth needs two; "
            "name the blocks, e.g. depth: ['model.layers.{}']"
        )
    if layer is None:
        return alpha + beta if tail == "deep" and is_tail(name) else alpha
    if layer == layers - 1:
        return alpha + beta  # exact at the deep end
    return alpha + beta * _CURVES[schedule](layer / (layers - 1))


def check_scales(alpha: float | None, beta: float) -> None:
    """Warn about an alpha outside [0, 1] and a beta below 0, as the published use has none."""
    if alpha is not None and not 0 <= alpha <= 1:
        warnings.warn(f"lines: alpha = {alpha} lies outside [0, 1]", stacklevel=4)
    if beta < 0:
        warnings.warn(f"lines: beta = {beta} shrinks deep layers more than shallow", stacklevel=4)


@step("lines", kind="update", paper="arXiv:2410.17146", idempotent=False)
@dataclass(frozen=True, kw_only=True)
class Lines:
    """Scale with depth."""

    alpha: float | None = None  # scale of the first block; None: by the norms
    beta: float = 0.5  # what is added until the last; the one value the paper tunes
    tail: Tail = "alpha"
    schedule: Schedule = "linear"
    norm_over: str = ""

    def check(self) -> None:
        """Warn about unusual scales. Raises InputError for a bad expression."""
        check_scales(self.alpha, self.beta)
        try:
            re.compile(self.norm_over)
        except re.error as error:
            raise InputError(f"lines: norm_over = {self.norm_over!r}: {error}") from None

    def folds(self) -> Sequence[Stage]:
        """Ask for the two norms, unless alpha is given."""
        if self.alpha is not None:
            return []
        experts = Sum(of=self._experts_size, scope="model")
        return [{"experts_l1": experts, "update_l1": Sum(of=self._size, scope="model")}]

    def _size(self, values: Array, *, at: At) -> Array:
        return abs(values) if re.search(self.norm_over, at.name) else values * 0

    def _experts_size(self, values: Array, *, at: At, base: Array, experts: Array) -> Array:
        return self._size(add_up(experts - base)[None], at=at)

    def __call__(
        self,
        values: Float[Array, "1 ..."],
        *,
        at: At,
        experts: Array,
        experts_l1: np.ndarray | None = None,
        update_l1: np.ndarray | None = None,
    ) -> Float[Array, "1 ..."]:
        """Scale one block. Raises InputError if the update is zero everywhere."""
        alpha = self.alpha
        if alpha is None:
            assert experts_l1 is not None
            assert update_l1 is not None
            if not float(update_l1[0]):
                raise InputError(
                    "lines: the merged update is zero everywhere, so its norm sets no alpha; "
                    "are the experts equal to the base?"
                )
            alpha = float(experts_l1[0]) / float(update_l1[0]) / experts.shape[0]
        factor = scale_at(at.layer, at.layers, at.name, alpha, self.beta, self.tail, self.schedule)
        return values * like(factor, values)

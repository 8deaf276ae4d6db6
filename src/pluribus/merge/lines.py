"""LiNeS: scale the update of any merge method linearly with depth.

Wang et al., ICLR 2025, https://arxiv.org/abs/2410.17146, section 4.

    tau    = what `of` adds to the base                                             (n,)
    scale  = alpha + beta l / (L - 1)   for block l of L, alpha outside the blocks
    alpha  = (1/T) ||sum_t tau_t||_1 / ||tau||_1   over the whole model, unless given
    theta  = theta_0 + scale tau                                                    (n,)

`of` is a merger, a chain of steps or its text, or `{merge_method, parameters}`; beta takes the
place of its scale. The step `lines` is the same behind a chain: `Ties(...) >> lines(beta=0.8)`. The
block of a tensor is read from its name by `pluribus.core.depth`; with fewer than two blocks it
refuses. `edit_single` scales the update of one fine-tuned model, so that it forgets less.

Deviates from the authors' code: of two numbers in a name (`blocks.3.mlp.0`) the block's counts, not
the smallest; L is the model's, not 12. `tail`, `schedule` and `norm_over` are the step's.

Cost: one pass more than `of` if alpha goes by the norms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from pluribus.core.arrays import Array, Float
from pluribus.core.chain import Chain, as_merger
from pluribus.core.depth import DepthMap, Rule, depth_map
from pluribus.core.errors import MismatchError
from pluribus.core.merger import FACTS, At, Stage, facts, merger
from pluribus.core.source import Source
from pluribus.core.weights import Elementwise, Weights
from pluribus.merge.steps.lines import Lines as LinesStep
from pluribus.merge.steps.lines import Schedule, Tail, check_scales, scale_at


@merger("lines", paper="arXiv:2410.17146", idempotent=False)
@dataclass(frozen=True, kw_only=True)
class Lines:
    """A merge method with its update scaled by depth."""

    of: Any = "sum"
    alpha: float | None = None  # scale of the first block; None: by the norms
    beta: float = 0.5  # what is added until the last; the one value the paper tunes
    tail: Tail = "alpha"
    schedule: Schedule = "linear"
    norm_over: str = ""

    def check(self) -> None:
        """Build the inner method, and take over its facts. Raises RecipeError or InputError."""
        object.__setattr__(self, "of", as_merger(self.of))
        inner, own = facts(self._chain), facts(type(self))
        object.__setattr__(
            self, FACTS, replace(inner, name=own.name, paper=own.paper, summary=own.summary)
        )

    @cached_property
    def _chain(self) -> Chain:
        return Chain.of(self.of) >> LinesStep(
            alpha=self.alpha,
            beta=self.beta,
            tail=self.tail,
            schedule=self.schedule,
            norm_over=self.norm_over,
        )

    def folds(self) -> Sequence[Stage]:
        """Ask for the inner method's folds and the two norms."""
        return self._chain.folds()

    def __call__(
        self, base: Float[Array, "..."], experts: Float[Array, "t ..."], *, at: At, **folded: Any
    ) -> Float[Array, "..."]:
        """Merge one block."""
        return self._chain(base, experts, at=at, **folded)


def edit_single(
    base: Any,
    finetuned: Any,
    alpha: float = 0.1,
    beta: float | None = None,
    *,
    depth: Rule | DepthMap = "auto",
    tail: Tail = "alpha",
    schedule: Schedule = "linear",
) -> Weights:
    """Return `finetuned` with its update scaled from alpha in the first block to alpha + beta.

    `beta` is 1 - alpha unless given: the last block keeps its whole update. Lazy: tensors are
    scaled when they are read. Raises InputError without two blocks, MismatchError if the models
    differ.
    """
    base, finetuned = Weights.open(base), Weights.open(finetuned)
    check_scales(alpha, 0.0 if beta is None else beta)
    beta = 1 - alpha if beta is None else beta
    layers = depth if isinstance(depth, DepthMap) else depth_map(finetuned, depth)
    layers.require("lines")
    sources: dict[str, Source] = {}
    for name, spec in finetuned.spec.items():
        source = finetuned.source(name)
        if spec.kind.is_float:
            if name not in base or base.spec[base.aliases.get(name, name)].shape != spec.shape:
                raise MismatchError(
                    f"{base.label} has no tensor {name!r} of shape {list(spec.shape)}, which "
                    f"{finetuned.label} has"
                )
            factor = scale_at(layers.layers[name], layers.count, name, alpha, beta, tail, schedule)
            if factor != 1:
                scaled = partial(_scaled, factor)
                source = Elementwise(scaled, [source, base.source(name)])
        sources[name] = source
    label = f"{finetuned.label} scaled by depth"
    return Weights(sources, label=label, aliases=finetuned.aliases, folder=finetuned.folder)


def _scaled(factor: float, finetuned: np.ndarray, base: np.ndarray) -> np.ndarray:
    return base + finetuned.dtype.type(factor) * (finetuned - base)

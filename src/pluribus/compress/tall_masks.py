"""TALL masks: keep every expert as one bit per weight on a shared multi-task vector.

Wang et al., ICML 2024, https://arxiv.org/abs/2405.07813, sections 3 and 4.

    tau_M   = what `multi` adds to the base, unscaled                                 (n,)
    m_t     = 1[|theta_0 - theta_t| > mask_lambda_t |theta_0 + tau_M - theta_t|]      (n,)
    theta_t = theta_0 + m_t tau_M     rounded once, to the base's type                (n,)

Bytes: base and vector in the base's type, and n / 8 for each task, against T checkpoints.
`multi` is "task_arithmetic" (a sum), "ties" (trimmed to 20 %, elected, summed), or any merger or
chain. `mask_lambda` is a number, one for each task, "l1" (1, which minimises the L1 error
||tau_t - m_t tau_M|| exactly) or "validate": of `grid` the first value with the best
`score(task, weights)`, as published. Larger values keep fewer weights. The vector is stored in the
base's type, and masks are computed against what is stored. `exclude` are regular expressions of
tensors that each task keeps as they are; batch-norm statistics, whole numbers and tensors that the
base lacks always are. `exact` adds each expert's compressed residual, so that it comes back bit for
bit; where only that matters the store `exact` is smaller (of four bf16 experts with independent
updates of relative size 0.01 it kept 0.60 of the checkpoints' bytes, masks with residuals 0.90).

Deviates from the authors' code in nothing but the file format.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pluribus.compress._bank import ExpertBank, Score, fit_bank
from pluribus.compress._store import compressor_facts
from pluribus.core.chain import Chain
from pluribus.core.errors import InputError, nearest
from pluribus.core.merger import NonNegative
from pluribus.merge.consensus import multi_task


@compressor_facts("tall_masks", paper="arXiv:2405.07813")
@dataclass(frozen=True, kw_only=True)
class TallMasks:
    """One vector and a mask for each task."""

    multi: Any = "task_arithmetic"
    mask_lambda: Literal["validate", "l1"] | NonNegative | dict[str, Any] = "validate"
    grid: tuple[NonNegative, ...] = (0.2, 0.3, 0.4, 0.5, 0.6)
    exclude: tuple[str, ...] = ()
    exact: bool = False

    def check(self) -> None:
        """Build the merge method. Raises RecipeError or InputError."""
        object.__setattr__(self, "multi", multi_task(self.multi))
        if not self.grid:
            raise InputError("tall_masks: grid has no value to choose from")

    def fit(
        self,
        base: Any,
        experts: Mapping[str, Any],
        score: Score | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> ExpertBank:
        """Return the bank, written to the folder `out` if given (else its vector is in memory).

        Raises InputError if a score is needed, MismatchError if the models differ.
        """
        values = self.mask_lambda
        if isinstance(values, Mapping):
            for task in [*values, *experts]:
                if task not in values or task not in experts:
                    near = nearest(task, experts if task in values else values)
                    raise InputError(f"mask_lambda and the experts differ in {task!r}.{near}")
        asked = values.values() if isinstance(values, Mapping) else [values]
        if "validate" in asked and score is None:
            raise InputError(
                "mask_lambda = 'validate' needs score(task, weights), a number to maximise on "
                "that task's validation data; without data give 'l1', or a number such as 0.4"
            )
        return fit_bank(
            self,
            base,
            experts,
            Chain.of(self.multi),
            "tall",
            values,
            exclude=self.exclude,
            exact=self.exact,
            grid=self.grid,
            score=score,
            out=out,
            overwrite=overwrite,
            **options,
        )

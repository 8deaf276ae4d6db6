"""EMR-Merging: one elected vector, and for every task a mask of its signs and a rescaler.

Huang et al., NeurIPS 2024, https://arxiv.org/abs/2405.17461, section 3.

    tau_M    = sign(sum_t tau_t) max over {t : tau_t has that sign} of |tau_t|        (n,)
    m_t      = 1[tau_t tau_M > 0]                                                     (n,)
    factor_t = sum |tau_t| / sum |m_t tau_M|     over the whole model
    theta_t  = theta_0 + factor_t m_t tau_M      rounded once, to the base's type     (n,)

No data and nothing to tune. A coordinate whose votes cancel counts as negative, as in the authors'
code. `rescale="mean"` is that code's factor: a ratio of sums over tensors of their means, in which
a bias weighs as much as a matrix; "sum" is the paper's formula. `exclude` and `exact` are as for
`tall_masks`. The vector is stored in the base's type.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pluribus.compress._bank import ExpertBank, Rescale, Score, fit_bank
from pluribus.compress._store import compressor_facts
from pluribus.core.chain import Chain
from pluribus.merge.steps.elect import Elect
from pluribus.merge.steps.max import Max


@compressor_facts("emr", paper="arXiv:2405.17461")
@dataclass(frozen=True, kw_only=True)
class Emr:
    """Elect, mask, rescale."""

    rescale: Rescale = "sum"
    exclude: tuple[str, ...] = ()
    exact: bool = False

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
        """Return the bank, written to the folder `out` if given; `score` is not needed."""
        del score
        return fit_bank(
            self,
            base,
            experts,
            Chain.of(Elect(tie="negative")) >> Max(),
            "sign",
            None,
            exclude=self.exclude,
            exact=self.exact,
            out=out,
            overwrite=overwrite,
            **options,
        )

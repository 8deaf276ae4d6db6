"""Keep every expert bit for bit, as its compressed difference from the base.

    data_t = zlib(byte planes(fold(bits(theta_t) - bits(theta_0))))

Differences of bit patterns are small numbers where values are close, so their high bytes are mostly
zero. What it saves depends on how far the experts moved and on their element type; `report` says.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pluribus.compress._bank import ExpertBank, Score, fit_bank
from pluribus.compress._store import compressor_facts


@compressor_facts("exact")
@dataclass(frozen=True, kw_only=True)
class Exact:
    """Lossless."""

    exclude: tuple[str, ...] = ()

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
            None,
            "none",
            None,
            exclude=self.exclude,
            exact=True,
            out=out,
            overwrite=overwrite,
            **options,
        )

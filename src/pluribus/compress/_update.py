"""What a merge method adds to the base, as a merger, so that the driver streams it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pluribus.core.arrays import Array
from pluribus.core.chain import text, update_of
from pluribus.core.merger import FACTS, At, Stage, facts, stages


@dataclass(frozen=True)
class Update:
    """The update of another merger; no base is added."""

    of: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, FACTS, replace(facts(self.of), name="update", base="required"))

    def __str__(self) -> str:
        return text(self.of)

    def folds(self) -> Sequence[Stage]:
        """Ask for the inner method's folds."""
        return stages(self.of)

    def __call__(self, base: Array, experts: Array, *, at: At, **folded: Any) -> Array:
        """Return the update of one block."""
        return update_of(self.of, base, experts, at, folded)

"""`Change`: how one tensor differs between two checkpoints; `Sum`: several of them together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Change:
    """One tensor that both models have, by the name it has in `before`."""

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]  # before
    new_shape: tuple[int, ...]
    dtype: str
    new_dtype: str
    compared: int  # elements compared; 0 if the shapes have nothing in common
    norm: float  # of `before`, over what is compared
    moved: float  # norm of D
    largest: float  # of |D|
    changed: int  # elements that differ
    rounded: bool  # `after` is `before` in another element type, exactly
    non_finite: tuple[int, int]  # elements that are NaN or infinite, before and after
    rank: int | None = None  # directions that hold HELD of |D|^2; None: too many, or unknown
    judged: bool = False  # whether the rank was looked for

    @property
    def ratio(self) -> float:
        """Length of the change over that of the tensor before; infinite if that was zero."""
        if not self.moved:
            return 0.0
        return self.moved / self.norm if self.norm else float("inf")

    @property
    def share(self) -> float:
        """Share of the compared elements that changed."""
        return self.changed / self.compared if self.compared else 0.0

    @property
    def resized(self) -> bool:
        """Whether the shapes differ."""
        return self.shape != self.new_shape

    @property
    def same(self) -> bool:
        """Whether nothing at all differs, type and shape included."""
        return not (self.changed or self.resized or self.dtype != self.new_dtype)


@dataclass(frozen=True)
class Sum:
    """Figures of several tensors together."""

    tensors: int
    differing: int  # tensors
    size: int
    changed: int
    norm: float
    moved: float
    largest: float
    low_rank: int  # changed matrices of low rank
    matrices: int  # changed matrices whose rank was looked for

    @classmethod
    def of(cls, changes: Sequence[Change]) -> "Sum":
        """Return the sum of some tensors."""
        return cls(
            len(changes),
            sum(not one.same for one in changes),
            sum(one.compared for one in changes),
            sum(one.changed for one in changes),
            sum(one.norm**2 for one in changes) ** 0.5,
            sum(one.moved**2 for one in changes) ** 0.5,
            max((one.largest for one in changes), default=0.0),
            sum(one.rank is not None for one in changes),
            sum(one.judged for one in changes),
        )

    @property
    def ratio(self) -> float:
        """Length of the change over that of the tensors before."""
        if not self.moved:
            return 0.0
        return self.moved / self.norm if self.norm else float("inf")

    @property
    def share(self) -> float:
        """Share of the elements that changed."""
        return self.changed / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "tensors": self.tensors,
            "differing": self.differing,
            "size": self.size,
            "changed": self.share,
            "ratio": self.ratio,
            "norm": self.moved,
            "largest": self.largest,
            "low_rank": self.low_rank,
            "matrices": self.matrices,
        }

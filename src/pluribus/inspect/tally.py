"""`Tally`: what is counted about a run of coordinates. Tallies of disjoint runs add up."""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from pluribus.core.shapes import Float, Int


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums and counts over some coordinates of a base and t task vectors.

    Matrices are symmetric. The *support* of an expert is its largest differences, a fixed share of
    each tensor; zeros belong to none.
    """

    size: int  # coordinates
    base_square: float  # squared norm of the base
    gram: Float[np.ndarray, "t t"]  # inner products of task vectors
    absolute: Float[np.ndarray, " t"]  # L1 norms
    changed: Int[np.ndarray, " t"]  # coordinates that differ from the base
    both: Int[np.ndarray, "t t"]  # changed by both experts
    opposed: Int[np.ndarray, "t t"]  # and in opposite directions
    changed_by: Int[np.ndarray, " 2"]  # changed by one expert or more, by two or more
    clashing: int  # moved up by one expert and down by another
    masks: Int[np.ndarray, " t"]  # coordinates in each TALL mask
    masked_by: Int[np.ndarray, " 3"]  # in one mask or more, in two or more, in all
    kept: Int[np.ndarray, " t"]  # size of the supports
    kept_square: Float[np.ndarray, " t"]  # squared norms on them
    kept_both: Int[np.ndarray, "t t"]
    kept_opposed: Int[np.ndarray, "t t"]
    kept_by: Int[np.ndarray, " 2"]
    kept_clashing: int

    @classmethod
    def none(cls, experts: int) -> "Tally":
        """Return the tally of no coordinates."""
        t = experts
        row, pair = np.zeros(t, np.int64), np.zeros((t, t), np.int64)
        two = np.zeros(2, np.int64)
        return cls(
            0, 0.0, pair * 0.0, row * 0.0, row, pair, pair, two, 0, row, np.zeros(3, np.int64),
            row, row * 0.0, pair, pair, two, 0,
        )  # fmt: skip

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    # -- shares, NaN where there is nothing to take a share of ------------------------------------

    @cached_property
    def norm(self) -> Float[np.ndarray, " t"]:
        """Lengths of the task vectors."""
        return np.sqrt(np.diag(self.gram))

    @cached_property
    def ratio(self) -> Float[np.ndarray, " t"]:
        """Lengths of the task vectors, relative to the base's."""
        return over(self.norm, np.sqrt(self.base_square))

    @cached_property
    def cosine(self) -> Float[np.ndarray, "t t"]:
        """Cosines between task vectors."""
        found = over(self.gram, np.outer(self.norm, self.norm))
        found[np.diag_indices_from(found)] = np.where(self.norm > 0, 1.0, np.nan)
        return np.clip(found, -1, 1)

    @cached_property
    def unchanged(self) -> Float[np.ndarray, " t"]:
        """Share of coordinates that equal the base's."""
        return 1 - over(self.changed, self.size)

    @cached_property
    def density(self) -> Float[np.ndarray, " t"]:
        """Effective density: the share of coordinates that would carry the task vector evenly.

        ‖τ‖₁² / (n ‖τ‖₂²): 1 if all magnitudes are equal, 2/π = 0.64 for a normal distribution, 1/n
        for a single coordinate.
        """
        return over(self.absolute**2, self.size * np.diag(self.gram))

    @cached_property
    def conflict(self) -> Float[np.ndarray, "t t"]:
        """Share of opposite signs among the coordinates that both experts change."""
        return over(self.opposed, self.both)

    @property
    def clash(self) -> float:
        """Share of coordinates changed by two experts or more on which they pull both ways."""
        return float(over(self.clashing, self.changed_by[1]))

    @cached_property
    def kept_conflict(self) -> Float[np.ndarray, "t t"]:
        """Share of opposite signs among the coordinates in both supports."""
        return over(self.kept_opposed, self.kept_both)

    @property
    def kept_clash(self) -> float:
        """Share of coordinates in any support on which two of them pull in opposite directions."""
        return float(over(self.kept_clashing, self.kept_by[0]))

    @cached_property
    def overlap(self) -> Float[np.ndarray, "t t"]:
        """Jaccard index of the supports: common coordinates, as a share of either's."""
        either = self.kept[:, None] + self.kept[None, :] - self.kept_both
        return over(self.kept_both, either)

    @cached_property
    def kept_energy(self) -> Float[np.ndarray, " t"]:
        """Share of the squared norm on the support."""
        return over(self.kept_square, np.diag(self.gram))

    @cached_property
    def mask_share(self) -> Float[np.ndarray, " t"]:
        """Share of coordinates in each TALL mask."""
        return over(self.masks, self.size)

    @property
    def catastrophic(self) -> float:
        """Share of coordinates in no TALL mask: no expert needs what they are merged to."""
        return 1 - float(over(self.masked_by[0], self.size))

    @property
    def selfish(self) -> float:
        """Share of coordinates in exactly one TALL mask."""
        return float(over(self.masked_by[0] - self.masked_by[1], self.size))

    @property
    def shared(self) -> float:
        """Share of coordinates in two TALL masks or more."""
        return float(over(self.masked_by[1], self.size))

    @property
    def universal(self) -> float:
        """Share of coordinates in all TALL masks."""
        return float(over(self.masked_by[2], self.size))


def over(part: object, whole: object) -> np.ndarray:
    """Divide, giving NaN where the divisor is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    out = np.full(part.shape, np.nan)
    np.divide(part, whole, out=out, where=whole != 0)
    return out


def pairs(matrix: np.ndarray) -> np.ndarray:
    """Return the entries of a symmetric matrix below its diagonal, without NaN."""
    values = matrix[np.tril_indices_from(matrix, -1)]
    return values[~np.isnan(values)]

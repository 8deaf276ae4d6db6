"""Add updates with learned coefficients: one for each tensor, expert and group of coordinates.

    m * sum_t c[t, g] values_t       (t, n) -> (n,)

What `pluribus tune` finds is replayed by this step: Yang et al., AdaMerging, ICLR 2024,
https://arxiv.org/abs/2310.02575; Zhang et al., aTLAS, NeurIPS 2024,
https://arxiv.org/abs/2407.02880; Tang et al., Concrete, https://arxiv.org/abs/2312.06173. Without a
file every coefficient is `scale`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pluribus.core.arrays import Array, Float, column, like, namespace
from pluribus.core.chain import step
from pluribus.core.coefficients import Coefficients, group_of
from pluribus.core.errors import InputError, MismatchError
from pluribus.core.merger import At, Beside
from pluribus.core.sparse import add_up


@step("blend", kind="combine", paper="arXiv:2310.02575")
@dataclass(frozen=True, kw_only=True)
class Blend:
    """Sum with coefficients from a file of them."""

    file: Beside = ""  # coefficients.safetensors
    digest: str = ""  # of the file's contents; a changed file is refused
    scale: float = 0.3  # every coefficient, if there is no file
    coefficients: Any = None  # the object itself, instead of a file

    def check(self) -> None:
        """Raise InputError if coefficients are given twice."""
        if self.file and self.coefficients is not None:
            raise InputError("blend: give file or coefficients, not both")

    @cached_property
    def found(self) -> Coefficients | None:
        """The coefficients. Raises MissingError, FormatError or MismatchError for a bad file."""
        if self.coefficients is not None:
            return self.coefficients
        return Coefficients.load(self.file, self.digest) if self.file else None

    def __call__(self, values: Float[Array, "t ..."], *, at: At) -> Float[Array, "..."]:
        """Combine one block. Raises MismatchError if the coefficients are another model's."""
        found = self.found
        if found is None:
            return add_up(values * column(self.scale, values))
        if len(found.experts) != values.shape[0]:
            raise MismatchError(
                f"the coefficients are for {len(found.experts)} experts "
                f"({', '.join(found.experts)}), but {values.shape[0]} were given"
            )
        scale = found.of(at.name)
        if found.partitions == 1:
            total = add_up(values * column(tuple(scale.tolist()), values))
        else:
            xp = namespace(values)
            group = group_of(at, found.partitions, found.seed, values)
            group = xp.reshape(group, values[0].shape)
            total = values[0] * 0
            for part in range(found.partitions):
                summed = add_up(values * column(tuple(scale[:, part].tolist()), values))
                total = xp.where(group == part, summed, total)
        masks = found.masks
        if masks is None or at.name not in masks:
            return total
        source = masks.source(at.name)
        if source.spec.size != at.size:
            raise MismatchError(
                f"the mask of {at.name!r} has shape {list(source.spec.shape)}, but the tensor "
                f"{list(at.shape)}"
            )
        mask = like(source.floats(at.start, at.stop), total)
        return total * mask.reshape(total.shape)

"""Give a model another tokenizer: rows of its vocabulary matrices for a donor's tokens.

A token that the model has keeps its row. The others get one by `method`:

    omp                   row = sum_i c_i W[i]; the donor's row of the token is near sum_i c_i D[i]
                          over tokens i that both have; at most k of the c_i are not 0
    common_interpolation  the same over the k tokens whose donor rows are nearest
    subword               from the rows of the pieces the model's own tokenizer cuts the token into
    mean                  the mean of the model's rows
    zero                  0
    randn                 standard normal
    john_hewitt           normal, with the mean and covariance of the model's rows

W: (n, d) of the model, D: (n, d') of the donor. The computations are those of mergekit-tokensurgeon
0.1.5; omp is described in Goddard and Fernandes Neto, "Training-free tokenizer transplantation via
orthogonal matching pursuit", 2025, https://arxiv.org/abs/2506.06607. Rows that belong to no token
(gaps, padding, ids for which the donor has no row) are the mean of the others, so that none of them
is ever the likeliest; there they are 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat
from pydantic.dataclasses import dataclass as checked

from pluribus.core.shapes import Float, Int64
from pluribus.tokenizer.errors import TokenizerError
from pluribus.tokenizer.surgery_draw import normal, spread
from pluribus.tokenizer.surgery_fit import Mix, Weighting, nearest, pursue
from pluribus.tokenizer.surgery_match import Made, Matched

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["omp", "common_interpolation", "subword", "mean", "zero", "randn", "john_hewitt"]
Subword = Literal["mean", "sum", "weighted_mean", "first_last"]
Where = Literal["no", "embed", "lm_head", "yes"]
BATCH_BYTES = 512 << 20  # of temporaries while tokens are approximated
Matrix = Float[np.ndarray, "v d"]


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Surgery:
    """How tokens that the model lacks get their rows; which other matches count, and where."""

    method: Method = "omp"
    k: Annotated[int, Field(ge=1)] = 64
    cosine: bool = False
    weighting: Weighting = "distance_proportional"
    subword: Subword = "mean"
    byte_match: Where = "no"
    prefix_match: Where = "no"
    pad_to_multiple_of: Annotated[int, Field(ge=0)] | None = None  # 0 is none
    noise: Annotated[FiniteFloat, Field(ge=0)] = 0.0  # standard deviation, added to new rows
    scale: FiniteFloat = 1.0  # of new rows, noise included
    seed: int = 0  # of noise and of methods that draw

    @property
    def combines(self) -> bool:
        """Whether the method combines common tokens, and so looks at the donor's rows."""
        return self.method in ("omp", "common_interpolation")


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """How the rows of one matrix were made.

    Errors are |x - approximation| / |x| over the donor's rows x of approximated tokens; None for
    methods that don't look at the donor's rows.
    """

    name: str
    copied: int
    by_byte: int
    by_prefix: int
    approximated: int
    without_token: int
    mean_error: float | None = None
    worst_error: float | None = None
    worst_token: str | None = None


def rows_for(
    name: str,
    own: Matrix,
    donor: Float[np.ndarray, "w c"],
    matched: Matched,
    how: Surgery,
    *,
    head: bool = False,
    pieces: Callable[[str], list[int]] | None = None,
    device: str = "cpu",
    on_rows: Callable[[int, int], None] | None = None,
) -> tuple[Matrix, MatrixReport]:
    """Return a matrix with a row for each of the donor's ids, and how its rows were made.

    `own` and `donor` are the models' float32 matrices; the donor's is used only if
    `how.combines`. `pieces` cuts a token into rows of `own` (for "subword"), `on_rows` is told
    (done, total) of approximated rows. Raises TokenizerError if a method needs common tokens and
    there are none.
    """
    out = np.zeros((len(matched.made), own.shape[1]), np.float32)
    copied = matched.row >= 0
    out[copied] = own[matched.row[copied]]
    new = matched.new
    errors = np.full(len(new), np.nan)
    if len(new) and how.combines:
        _by_anchors(out, own, donor, matched, how, errors, device, on_rows)
    elif len(new) and how.method == "subword":
        assert pieces is not None
        for done, index in enumerate(new, 1):
            out[index] = from_pieces(own[pieces(matched.tokens[index])], how.subword, head)
            if on_rows is not None and (done % 1024 == 0 or done == len(new)):
                on_rows(done, len(new))
    elif how.method == "mean":
        out[new] = own.mean(0, dtype=np.float64)
    elif len(new) and how.method in ("randn", "john_hewitt"):
        _by_chance(out, own, name, new, how, on_rows)
    if how.noise:
        drawn = normal(new, out.shape[1], name=name, stream="noise", seed=how.seed)
        out[new] += np.float32(how.noise) * drawn
    out[new] *= np.float32(how.scale)
    loose = matched.made == Made.NONE
    out[loose] = out[~loose].mean(0, dtype=np.float64)
    known = len(new) > 0 and how.combines
    worst = int(errors.argmax()) if known else 0
    return out, MatrixReport(
        name=name,
        copied=matched.count(Made.EXACT),
        by_byte=matched.count(Made.BYTE),
        by_prefix=matched.count(Made.PREFIX),
        approximated=len(new),
        without_token=int(loose.sum()),
        mean_error=float(errors.mean()) if known else None,
        worst_error=float(errors[worst]) if known else None,
        worst_token=matched.tokens[int(new[worst])] if known else None,
    )


def _by_anchors(
    out: Matrix,
    own: Matrix,
    donor: Float[np.ndarray, "w c"],
    matched: Matched,
    how: Surgery,
    errors: Float[np.ndarray, " m"],
    device: str,
    on_rows: Callable[[int, int], None] | None,
) -> None:
    """Fill the new rows of `out` and their `errors` by combinations over common tokens."""
    import torch

    anchors = matched.anchors
    anchors = anchors[anchors < len(donor)]
    if not len(anchors):
        raise TokenizerError(
            f"the tokenizers have no token in common, so {how.method} has nothing to combine; use "
            "method 'subword' or 'mean'"
        )
    points = torch.from_numpy(donor[anchors]).to(device)
    rows = torch.from_numpy(own[matched.row[anchors]]).to(device)
    new = matched.new
    for first, last in _batches(len(new), min(how.k, len(anchors)), points.shape):
        ids = new[first:last]
        targets = torch.from_numpy(donor[ids]).to(device)
        mix = _mix(targets, points, how)
        out[ids] = mix.of(rows).cpu().numpy()
        lost = (mix.of(points) - targets).norm(dim=1) / targets.norm(dim=1).clamp_min(1e-30)
        errors[first:last] = lost.cpu().numpy()
        if on_rows is not None:
            on_rows(last, len(new))


def _by_chance(
    out: Matrix,
    own: Matrix,
    name: str,
    new: Int64[np.ndarray, " m"],
    how: Surgery,
    on_rows: Callable[[int, int], None] | None,
) -> None:
    """Fill the new rows of `out` at random."""
    mean, root = spread(own) if how.method == "john_hewitt" else (None, None)
    for first in range(0, len(new), 1024):
        ids = new[first : first + 1024]
        drawn = normal(ids, out.shape[1], name=name, stream="row", seed=how.seed)
        out[ids] = drawn if root is None else mean + drawn @ root.T
        if on_rows is not None:
            on_rows(first + len(ids), len(new))


def _mix(targets: "Tensor", points: "Tensor", how: Surgery) -> Mix:
    if how.method == "omp":
        return pursue(targets, points, how.k)
    return nearest(targets, points, how.k, how.weighting, how.cosine)


def _batches(count: int, k: int, points: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut `count` tokens so that a batch's temporaries fit `BATCH_BYTES`."""
    anchors, width = points
    each = 4 * (4 * k * width + 3 * anchors + 2 * k * k)
    size = max(1, min(512, BATCH_BYTES // each))
    for first in range(0, count, size):
        yield first, min(first + size, count)


def from_pieces(
    pieces: Float[np.ndarray, "p d"], how: Subword, head: bool
) -> Float[np.ndarray, " d"]:
    """Combine the rows of a token's pieces; 0 if there are none.

    "weighted_mean" weighs p pieces p ... 1 in an input embedding and 1 ... p in a head,
    "first_last" takes the last one's row in an input embedding and the first one's in a head, as
    mergekit-tokensurgeon 0.1.5 does.
    """
    count = len(pieces)
    if count == 0:
        return np.zeros(pieces.shape[1], np.float32)
    if how == "first_last":
        return pieces[0 if head else -1]
    if how == "weighted_mean":
        rising = np.arange(1, count + 1)
        return np.average(pieces, 0, rising if head else rising[::-1])
    return pieces.sum(0) if how == "sum" else pieces.mean(0)

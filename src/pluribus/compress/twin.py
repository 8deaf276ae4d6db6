"""Twin-Merging's modular experts: one shared expert and a small exclusive part for each task.

Lu et al., NeurIPS 2024, https://arxiv.org/abs/2406.15479, section 4.1.

    theta* = theta_0 + 0.3 sum_t tau_t, or any other merge                            (R, c)
    e_t    = theta_t - theta*, compressed for each tensor with two axes or more       (R, c)
             "svd":       its leading `rank` singular triplets, or int(density min(R, c)) of them
             "magnitude": the int(density R c) largest values
             "bernoulli": each value with probability density, divided by it
    theta(w) = theta* + sum_t w_t e_t

Tensors with one axis are kept whole, and density 1 keeps everything. Tensors that match `exclude`
(heads, or biases as in the authors' code), that are not floating point, or that the base lacks are
each task's own. Axes behind the first count as columns. Compressed values are stored in `dtype`, or
in the base's type, and whole ones always in the base's; e_t is taken from theta* as it is stored.
At equal bytes, half precision (`dtype="float16"`, ours) gives twice the rank.

Deviates from the authors' code: a density never gives rank 0 (`rank=0` does, and drops the part);
bits depend on the seed, not on the order of tensors.

Cost: one merge, then a float64 SVD of each matrix of each task, one at a time.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from pluribus.compress._bank import Score
from pluribus.compress._store import Split, Spool, compressor_facts, split, staged, wide_of
from pluribus.compress._twins import STEP, TwinStore
from pluribus.core.chain import Chain, as_merger, text
from pluribus.core.dtypes import all_finite, narrow, numpy_dtype
from pluribus.core.dtypes import dtype as dtype_of
from pluribus.core.errors import InputError, NonFiniteError
from pluribus.core.merger import At, Share
from pluribus.core.random import uniform
from pluribus.core.source import Source
from pluribus.core.weights import Weights
from pluribus.merge.steps.scale import Scale
from pluribus.merge.steps.sum import Sum

SHARED = Chain.of(Sum()) >> Scale(scale=0.3)


@compressor_facts("twin", paper="arXiv:2406.15479")
@dataclass(frozen=True, kw_only=True)
class Twin:
    """A shared expert and compressed exclusive parts."""

    shared: Any = SHARED
    compress: Literal["svd", "magnitude", "bernoulli"] = "svd"
    density: Share | None = None  # 0.1 if neither this nor rank is given
    rank: Annotated[int, Ge(0)] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of compressed values
    exclude: tuple[str, ...] = ()

    def check(self) -> None:
        """Build the merge method. Raises RecipeError or InputError."""
        if self.density is not None and self.rank is not None:
            raise InputError("twin: density and rank are two ways to say one thing; give one")
        if self.rank is not None and self.compress != "svd":
            raise InputError(f"twin: rank is for svd; {self.compress} takes a density")
        if not isinstance(self.shared, Weights):
            object.__setattr__(self, "shared", as_merger(self.shared))

    def fit(
        self,
        base: Any,
        experts: Mapping[str, Any],
        score: Score | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> TwinStore:
        """Return the store, written to the folder `out` if given (else in memory).

        `score` is not needed. Raises MismatchError if the models differ in a shared tensor.
        """
        del score
        parts = split(base, experts, self.exclude)
        self._warn(parts)
        if out is None:
            store, _ = self._made(parts, None, seed, options)
            return store
        with staged(out, overwrite) as stage:
            store, written = self._made(parts, stage, seed, options)
            store.write(stage, written)
        return TwinStore.open(out, parts.base)

    def _warn(self, parts: Split) -> None:
        for pattern in self.exclude:
            names = [*parts.base.spec, *(n for own in parts.own.values() for n in own.spec)]
            if not any(re.search(pattern, name) for name in names):
                warnings.warn(f"twin: exclude {pattern!r} matches no tensor", stacklevel=3)
        floats = [name for name, spec in parts.base.spec.items() if spec.kind.is_float]
        if self.exclude and 2 * len(parts.shared) < len(floats):
            warnings.warn(
                f"twin: exclude leaves {len(parts.shared)} of {len(floats)} tensors to be shared",
                stacklevel=3,
            )

    def _made(
        self, parts: Split, stage: Path | None, seed: int, options: Mapping[str, Any]
    ) -> tuple[TwinStore, dict[str, str | None]]:
        shared = self._shared(parts, stage, seed, options)
        pieces, kept, written = {}, {}, {}
        for number, (task, expert) in enumerate(parts.experts.items()):
            into = Spool(stage / f"part-{number:03d}.raw" if stage else None)
            energy = np.zeros(2)
            for name in parts.shared:
                energy += self._compress(
                    name, shared.source(name), expert.source(name), into, f"{task}/{seed}"
                )
            kept[task] = float(energy[1] / energy[0]) if energy[0] else 1.0
            if stage is None:
                pieces[task], written[task] = into.weights(task), None
            else:
                file = into.save(stage, f"part-{number:03d}.safetensors")
                written[task] = file
                pieces[task] = Weights.open(stage / file) if file else Weights({})
        about = {
            "shared": "weights" if isinstance(self.shared, Weights) else text(self.shared),
            "compress": self.compress,
            "density": self.density,
            "rank": self.rank,
            "dtype": self.dtype,
            "exclude": list(self.exclude),
        }
        sizes = {task: expert.nbytes for task, expert in parts.experts.items()}
        store = TwinStore(shared, pieces, parts.own, parts.shared, sizes, about, kept)
        return store, written

    def _shared(
        self, parts: Split, stage: Path | None, seed: int, options: Mapping[str, Any]
    ) -> Weights:
        """Return the shared expert with all of the base's tensors, written if there is a stage."""
        if isinstance(self.shared, Weights):
            merged = parts.of(self.shared)
        else:
            from pluribus.core.pool import Pool
            from pluribus.engine.driver import merge

            pool = Pool(parts.of(parts.base), {t: parts.of(w) for t, w in parts.experts.items()})
            out = stage / "merged.safetensors" if stage else None
            merged = merge(pool, self.shared, out, seed=seed, **options)
        base = parts.base
        names = set(parts.shared)
        sources = {n: merged.source(n) if n in names else base.source(n) for n in base.spec}
        whole = Weights(sources, label="shared", aliases=base.aliases, folder=base.folder)
        if stage is None:
            return whole
        if isinstance(self.shared, Weights) or len(names) < len(base.spec):
            whole.save(stage / "shared.safetensors")
            for path in stage.glob("merged.*"):
                path.unlink()
        else:
            (stage / "merged.safetensors").rename(stage / "shared.safetensors")
            for path in stage.glob("merged.*"):
                path.rename(stage / path.name.replace("merged", "shared", 1))
        found = Weights.open(stage / "shared.safetensors")
        return Weights(
            {n: found.source(n) for n in base.spec}, label="shared", aliases=base.aliases,
            folder=base.folder,
        )  # fmt: skip

    def _compress(
        self, name: str, shared: Source, expert: Source, into: Spool, stream: str
    ) -> np.ndarray:
        """Spool one exclusive part; return ||e||^2 before and after."""
        shape, whole = shared.spec.shape, shared.spec.kind
        small = whole if self.dtype is None else dtype_of(self.dtype)
        wide = wide_of(shared, expert)
        gap = expert.floats(wide=wide) - shared.floats(wide=wide)
        full = float(np.square(gap, dtype=np.float64).sum())
        density = 0.1 if self.density is None and self.rank is None else self.density

        def stored(values: np.ndarray) -> np.ndarray:
            raw = narrow(np.ascontiguousarray(values, wide), small)
            if not all_finite(raw.view(numpy_dtype(small))):
                raise NonFiniteError(
                    f"twin: part {stream.rpartition('/')[0]} of {name} is beyond the range of "
                    f"{small.torch}; give dtype bfloat16, or leave dtype out"
                )
            return raw

        if len(shape) < 2 or gap.size == 0 or density == 1:
            values = narrow(np.ascontiguousarray(gap, wide), whole)
            into.add(f"dense/{name}", [values], whole.name, shape)
            return np.array([full, full])
        if density == 0 or self.rank == 0:
            return np.array([full, 0.0])
        if self.compress == "svd":
            from pluribus.core.lowrank import extract

            matrix = gap.reshape(shape[0], -1)
            least = min(matrix.shape)
            rank = max(1, int((density or 0) * least)) if self.rank is None else self.rank
            a, b = extract(matrix, min(rank, least))
            into.add(f"a/{name}", [stored(a)], small.name, a.shape)
            into.add(f"b/{name}", [stored(b)], small.name, b.shape)
            # The factors share the singular values' roots: ||b a||^2 is the sum of (b_i a_i)^2.
            held = float((np.square(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=0))).sum())
            return np.array([full, held])
        assert density is not None
        if self.compress == "magnitude":
            count = max(1, int(density * gap.size))
            flags = np.zeros(gap.size, bool)
            # A stable sort: of equal magnitudes the first stay.
            flags[np.argsort(-np.abs(gap), kind="stable")[:count]] = True
            values = gap[flags]
            held = float(np.square(values, dtype=np.float64).sum())
        else:
            at = At(name, shape, 0, gap.size, seed=0)
            flags = np.asarray(uniform(at, f"twin/{stream}", gap)) < density
            held = float(np.square(gap[flags], dtype=np.float64).sum())
            values = gap[flags] / wide(density)
        into.add(f"mask/{name}", [np.packbits(flags)], "U8")
        into.add(f"seen/{name}", [_seen(flags)], "I64")
        into.add(f"kept/{name}", [stored(values)], small.name)
        return np.array([full, held])


def _seen(flags: np.ndarray) -> np.ndarray:
    """Count how many flags are set before each STEP elements."""
    starts: Iterable[int] = range(0, flags.size, STEP)
    counts = [int(np.count_nonzero(flags[start : start + STEP])) for start in starts]
    return np.cumsum([0, *counts[:-1]]).astype(np.int64)

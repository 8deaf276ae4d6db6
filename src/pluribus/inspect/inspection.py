"""`inspect(pool)`: measure how experts relate to their base and to each other.

Two passes over the files give all figures that add up. What costs more is asked for: spectra of
task vectors (`rank`, `energy`), the lines between models (`score`), and what blocks make of inputs
(`models` and `inputs`).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pluribus.core.depth import is_tail
from pluribus.core.errors import InputError
from pluribus.core.pool import Pool
from pluribus.engine.run import Progress
from pluribus.inspect import advice
from pluribus.inspect.kinds import ORDER, kind_of
from pluribus.inspect.measure import Survey, measure
from pluribus.inspect.tally import Tally, pairs

if TYPE_CHECKING:
    from pluribus.inspect.connectivity import Connectivity
    from pluribus.inspect.similarity import Similarity
    from pluribus.inspect.spectra import Spectra
    from pluribus.inspect.trial import Trials


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Figures are properties of a `Tally`: a tensor's, layer's or model's."""

    base: str
    experts: tuple[str, ...]
    density: float  # share of each tensor in a support
    mask_lambda: float  # threshold of the TALL masks
    tensors: dict[str, Tally]  # in the model's order
    depth: dict[str, int | None]  # block of each tensor
    blocks: int
    warnings: tuple[str, ...]
    seconds: float
    bytes_read: int
    kind: dict[str, str]  # what each tensor does in its layer
    spectra: "Spectra | None" = None
    connectivity: "Connectivity | None" = None
    similarity: "Similarity | None" = None
    trials: "Trials | None" = None

    @cached_property
    def model(self) -> Tally:
        """The whole model."""
        return self._sum(list(self.tensors))

    @cached_property
    def layers(self) -> dict[str, Tally]:
        """Sums by block number, between what comes before the blocks and what follows them."""
        return {label: self._sum(names) for label, names in self.names_by_layer.items()}

    @cached_property
    def kinds(self) -> dict[str, Tally]:
        """Sums by what tensors do: attention projections, mlp, norms, embeddings, ..."""
        return {kind: self._sum(names) for kind, names in self.names_by_kind.items()}

    @cached_property
    def atlas(self) -> dict[str, dict[str, Tally]]:
        """Sums by layer and kind; without those that no tensor belongs to."""
        found: dict[str, dict[str, Tally]] = {}
        for label, names in self.names_by_layer.items():
            groups = {kind: [n for n in names if self.kind[n] == kind] for kind in self.kinds}
            found[label] = {kind: self._sum(group) for kind, group in groups.items() if group}
        return found

    @cached_property
    def names_by_layer(self) -> dict[str, list[str]]:
        """Tensors of each layer, in the order of `layers`."""
        groups: dict[str, list[str]] = {"before": []}
        groups |= {str(number): [] for number in range(self.blocks)} | {"after": []}
        for name in self.tensors:
            number = self.depth[name]
            tail = "after" if self.blocks and is_tail(name) else "before"
            groups[tail if number is None else str(number)].append(name)
        return {label: names for label, names in groups.items() if names}

    @cached_property
    def names_by_kind(self) -> dict[str, list[str]]:
        """Tensors of each kind, in a fixed order of kinds."""
        groups: dict[str, list[str]] = {kind: [] for kind in ORDER}
        for name in self.tensors:
            groups[self.kind[name]].append(name)
        return {kind: names for kind, names in groups.items() if names}

    @cached_property
    def advice(self) -> advice.Advice:
        """The method to try first, and why."""
        found = advice.recommend(self.model, self.blocks, self.density)
        return found if self.trials is None else advice.settled(found, self.trials)

    def _sum(self, names: list[str]) -> Tally:
        total = Tally.none(len(self.experts))
        for name in names:
            total = total + self.tensors[name]
        return total

    def table(self) -> str:
        """Return the findings for a terminal."""
        from pluribus.inspect.render import terminal

        return terminal(self)

    def html(self, title: str = "") -> str:
        """Return the findings as one self-contained page."""
        from pluribus.inspect.render import page

        return page(self, title)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values, None where there is nothing to measure."""
        return {
            "base": self.base,
            "experts": list(self.experts),
            "density": self.density,
            "mask_lambda": self.mask_lambda,
            "model": figures(self.model),
            "layers": {label: figures(tally) for label, tally in self.layers.items()},
            "kinds": {kind: figures(tally) for kind, tally in self.kinds.items()},
            "atlas": {
                label: {kind: _brief(tally) for kind, tally in row.items()}
                for label, row in self.atlas.items()
            },
            "tensors": {
                name: {"layer": self.depth[name], "kind": self.kind[name], **figures(tally)}
                for name, tally in self.tensors.items()
            },
            "spectra": self.spectra and plain(self.spectra.to_dict()),
            "connectivity": self.connectivity and plain(self.connectivity.to_dict()),
            "similarity": self.similarity and plain(self.similarity.to_dict()),
            "trials": self.trials and plain(self.trials.to_dict()),
            "warnings": list(self.warnings),
            "recommendation": {
                "method": self.advice.method,
                "parameters": self.advice.parameters,
                "reasons": list(self.advice.reasons),
                "rule_of_thumb": not (self.advice.expected or self.advice.tried),
                "expected": [
                    {"method": one.method, "loss": one.loss, "spread": one.spread}
                    for one in self.advice.expected
                ],
                "similar_pools": [
                    {
                        "pool": one.label,
                        "distance": one.distance,
                        "best": one.best,
                        "loss": one.loss,
                    }
                    for one in self.advice.near
                ],
            },
            "seconds": round(self.seconds, 3),
            "bytes_read": self.bytes_read,
        }


FIGURES = (
    "norm", "ratio", "cosine", "unchanged", "density", "conflict", "clash", "overlap",
    "kept_conflict", "kept_clash", "kept_energy", "mask_share", "catastrophic", "selfish",
    "shared", "universal",
)  # fmt: skip


def figures(tally: Tally) -> dict[str, Any]:
    """Return the figures of a tally as plain values."""
    return {"size": tally.size, **{name: plain(getattr(tally, name)) for name in FIGURES}}


def _brief(tally: Tally) -> dict[str, Any]:
    """Return a cell of the atlas: means over pairs of experts, and each expert's growth."""
    means = {
        name: float(found.mean()) if (found := pairs(getattr(tally, name))).size else None
        for name in ("cosine", "conflict", "overlap", "kept_conflict")
    }
    return {"size": tally.size, "ratio": plain(tally.ratio), **means}


def plain(value: Any) -> Any:
    """Return arrays as lists and what is not finite as None, for JSON."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect(
    pool: Pool,
    *,
    density: float = 0.2,
    mask_lambda: float = 0.4,
    rank: int | None = None,
    energy: float | None = None,
    score: "Callable[[Any], float | Mapping[str, float]] | None" = None,
    points: int = 5,
    tries: int = 0,
    models: Mapping[str, Any] | None = None,
    inputs: Sequence[Any] | None = None,
    threads: int | None = None,
    memory: int = 512 << 20,
    on_progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Compare the experts of a pool with its base and with each other.

    `density` is the share of each tensor that counts as an expert's support, `mask_lambda` the
    threshold of the TALL masks, `memory` a budget in bytes for blocks in flight. Raises InputError
    without a base, MismatchError if the models do not fit, NonFiniteError for NaN.

    On request: subspaces of `rank` dimensions or of a share `energy` (see `spectra`); `points` on
    every line between two models by `score(weights)`, higher being better (see `connectivity`;
    0 walks none); merges by the `tries` methods that are forecast to lose least, scored the same
    way, of which the best is recommended (see `trial`);
    the similarity of the blocks of `models` (modules or functions that load them, by name) on
    batches of `inputs` (see `similarity`).
    """
    if pool.base is None:
        raise InputError("inspect compares experts with their base; give the base as well")
    if (models is None) != (inputs is None):
        raise InputError("give models and inputs, or neither: similarity needs both")
    if tries and score is None:
        raise InputError(f"{tries} methods to try, and no score to tell which is best; give one")
    began = time.perf_counter()
    survey = Survey(density=density, mask_lambda=mask_lambda)
    plan, tallies, read = measure(
        pool, survey, threads=threads, memory=memory, on_progress=on_progress
    )
    found = Inspection(
        pool.base.label,
        tuple(pool.experts),
        density,
        mask_lambda,
        tallies,
        {job.name: job.layer for job in plan.jobs if job.name in tallies},
        plan.layers,
        (),
        0.0,
        read,
        {job.name: kind_of(job.name, job.spec.shape) for job in plan.jobs if job.name in tallies},
    )
    notes = advice.warnings(pool, found.model, list(tallies)) + advice.whole_numbers(pool)
    more: dict[str, Any] = {}
    if rank is not None or energy is not None:
        from pluribus.inspect.spectra import spectra

        more["spectra"] = spectra(
            pool,
            rank=rank,
            energy=energy,
            threads=threads,
            memory=memory,
            on_progress=on_progress,
        )
    found = replace(found, warnings=tuple(notes), **more)
    if score is not None or models is not None:
        from pluribus.inspect.asked import completed

        found = completed(found, pool, points, score, tries, models, inputs, threads, on_step)
    return replace(found, seconds=time.perf_counter() - began)

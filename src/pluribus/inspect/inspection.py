"""`inspect(pool)`: measure how experts relate to their base and to each other."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pluribus.core.depth import is_tail
from pluribus.core.errors import InputError
from pluribus.core.pool import Pool
from pluribus.engine.run import Progress
from pluribus.inspect import advice
from pluribus.inspect.measure import Survey, measure
from pluribus.inspect.tally import Tally


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

    @cached_property
    def model(self) -> Tally:
        """The whole model."""
        return self._sum(list(self.tensors))

    @cached_property
    def layers(self) -> dict[str, Tally]:
        """Sums by block number, between what comes before the blocks and what follows them."""
        groups: dict[str, list[str]] = {"before": []}
        groups |= {str(number): [] for number in range(self.blocks)}
        rest: dict[str, list[str]] = defaultdict(list)
        for name in self.tensors:
            number = self.depth[name]
            if number is not None:
                groups[str(number)].append(name)
            else:
                rest["after" if self.blocks and is_tail(name) else "before"].append(name)
        groups |= rest
        return {label: self._sum(names) for label, names in groups.items() if names}

    @cached_property
    def advice(self) -> advice.Advice:
        """The method to try first, and why. A rule of thumb."""
        return advice.advise(self.model, self.blocks, self.density)

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
            "tensors": {
                name: {"layer": self.depth[name], **figures(tally)}
                for name, tally in self.tensors.items()
            },
            "warnings": list(self.warnings),
            "recommendation": {
                "method": self.advice.method,
                "parameters": self.advice.parameters,
                "reasons": list(self.advice.reasons),
                "rule_of_thumb": True,
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
    return {"size": tally.size, **{name: _plain(getattr(tally, name)) for name in FIGURES}}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect(
    pool: Pool,
    *,
    density: float = 0.2,
    mask_lambda: float = 0.4,
    threads: int | None = None,
    memory: int = 512 << 20,
    on_progress: Callable[[Progress], None] | None = None,
) -> Inspection:
    """Compare the experts of a pool with its base and with each other.

    `density` is the share of each tensor that counts as an expert's support, `mask_lambda` the
    threshold of the TALL masks, `memory` a budget in bytes for blocks in flight. Raises InputError
    without a base, MismatchError if the models do not fit, NonFiniteError for NaN.
    """
    if pool.base is None:
        raise InputError("inspect compares experts with their base; give the base as well")
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
    )
    notes = advice.warnings(pool, found.model, list(tallies)) + advice.whole_numbers(pool)
    seconds = time.perf_counter() - began
    return Inspection(**{**_fields(found), "warnings": tuple(notes), "seconds": seconds})


def _fields(found: Inspection) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Inspection.__dataclass_fields__}

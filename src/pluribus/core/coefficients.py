"""Learned coefficients of a composition, per tensor and expert, and where they are kept.

    theta_j = theta0_j + m_j * sum_t c_j[t, g] tau_tj      m_j in the tensor's shape, or 1

`g` is the group of each coordinate: with `partitions` > 1 the coordinates of a tensor are dealt at
random into that many groups, from `seed` and the tensor's name alone, so only the seed is kept.

The file is ordinary safetensors: `scale/NAME` float32 (t,) or (t, partitions), `mask/NAME` in the
tensor's own shape, and one line of metadata with the experts' names in their order. A few kilobytes
without masks; any viewer opens it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from pluribus.core.arrays import Array
from pluribus.core.errors import FormatError, InputError, MismatchError, NonFiniteError, nearest
from pluribus.core.merger import At
from pluribus.core.random import uniform
from pluribus.core.weights import Weights

KEY = "pluribus.coefficients"
STREAM = "partition"


def groups(name: str, size: int, partitions: int, seed: int) -> np.ndarray:
    """Return the group of every coordinate of a tensor, (n,) int64 in [0, partitions)."""
    at = At(name, (size,), 0, size, seed=seed)
    drawn = group_of(at, partitions, seed, np.empty(0, np.float32))
    return np.asarray(drawn).astype(np.int64)


def group_of(at: At, partitions: int, seed: int, like: Array) -> Array:
    """Return the group of each coordinate of a block as whole numbers in `like`'s float type."""
    drawn = uniform(at._replace(seed=seed), STREAM, like)
    return (drawn * partitions) // 1


@dataclass(frozen=True, eq=False)
class Coefficients:
    """One coefficient for each expert (and group) of each tensor, and masks if there are any."""

    scales: Mapping[str, np.ndarray]  # (t,) or (t, partitions), float32
    experts: tuple[str, ...]  # their names, in the order of t
    masks: Weights | None = None  # names are tensors'
    partitions: int = 1
    seed: int = 0  # of the partition
    note: Mapping[str, str] = field(default_factory=dict)  # for people: who made it and how

    def __post_init__(self) -> None:
        """Raise InputError, MismatchError or NonFiniteError for what cannot be applied."""
        if self.partitions < 1:
            raise InputError(f"partitions = {self.partitions}: give at least 1")
        wanted = (len(self.experts),) + ((self.partitions,) if self.partitions > 1 else ())
        for name, scale in self.scales.items():
            if scale.shape != wanted:
                raise MismatchError(
                    f"coefficients of {name!r} have shape {list(scale.shape)}, but "
                    f"{len(self.experts)} experts and {self.partitions} partition(s) need "
                    f"{list(wanted)}"
                )
            if not np.isfinite(scale).all():
                raise NonFiniteError(f"coefficients of {name!r} are not finite: {scale.tolist()}")

    def of(self, name: str) -> np.ndarray:
        """Return the coefficients of one tensor. Raises MismatchError if it has none."""
        found = self.scales.get(name)
        if found is None:
            raise MismatchError(
                f"there are no coefficients for tensor {name!r}; they were learned on another "
                f"model.{nearest(name, self.scales)}"
            )
        return found

    def mask(self, name: str) -> "np.ndarray | None":
        """Return a tensor's whole mask, flat, or None if it has none."""
        if self.masks is None or name not in self.masks:
            return None
        return self.masks.source(name).floats()

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides a result: names, numbers, masks, partition."""
        state = xxhash.xxh3_128()
        state.update(json.dumps([list(self.experts), self.partitions, self.seed]).encode())
        for name in sorted(self.scales):
            state.update(f"{name}\0".encode())
            state.update(np.ascontiguousarray(self.scales[name], np.float32))
        if self.masks is not None:
            for name in sorted(self.masks.spec):
                state.update(f"mask {name}\0".encode())
                state.update(self.masks.source(name).load())
        return state.hexdigest()

    def __repr__(self) -> str:
        return f"Coefficients({self.digest})"

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them under a temporary name and rename it into place."""
        tensors: dict[str, np.ndarray | object] = {
            f"scale/{name}": np.ascontiguousarray(scale, np.float32)
            for name, scale in self.scales.items()
        }
        if self.masks is not None:
            tensors |= {f"mask/{name}": self.masks.source(name) for name in self.masks.spec}
        table = {
            "version": 1,
            "experts": list(self.experts),
            "partitions": self.partitions,
            "seed": self.seed,
            "digest": self.digest,
            **({"note": dict(self.note)} if self.note else {}),
        }
        Weights.of(tensors).save(Path(path), {KEY: json.dumps(table)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], digest: str = "") -> "Coefficients":
        """Read a file of coefficients.

        Raises MissingError, FormatError for a file that is none, and MismatchError if `digest` is
        given and the contents have another one.
        """
        weights = Weights.open(os.fspath(path))
        try:
            table = json.loads(weights.metadata.get(KEY, ""))
            experts = tuple(str(name) for name in table["experts"])
            partitions, seed = int(table["partitions"]), int(table["seed"])
            version = int(table["version"])
        except (ValueError, KeyError, TypeError):
            raise FormatError(
                f"{path}: holds no learned coefficients; give the coefficients.safetensors that "
                "`pluribus tune` wrote"
            ) from None
        if version != 1:
            raise FormatError(f"{path}: written by a newer pluribus (version {version})")
        scales = {
            name.removeprefix("scale/"): weights.source(name).floats().reshape(spec.shape)
            for name, spec in weights.spec.items()
            if name.startswith("scale/")
        }
        masks = {
            name.removeprefix("mask/"): weights.source(name)
            for name in weights.spec
            if name.startswith("mask/")
        }
        found = cls(
            scales,
            experts,
            Weights(masks, label=f"masks of {path}") if masks else None,
            partitions,
            seed,
            table.get("note") or {},
        )
        if digest and found.digest != digest:
            raise MismatchError(
                f"{path}: its contents have digest {found.digest}, but the recipe was made for "
                f"{digest}; the file was changed or replaced"
            )
        return found

    def table(self) -> Sequence[tuple[str, tuple[float, ...]]]:
        """Return one row a tensor: its name and each expert's (mean) coefficient."""
        return [
            (name, tuple(float(x) for x in scale.reshape(len(self.experts), -1).mean(1)))
            for name, scale in self.scales.items()
        ]

"""A merge as a list of jobs, one per output tensor, made from headers before anything is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pluribus.core.merger import Facts, columns, facts, stages
from pluribus.core.source import Source, TensorSpec

BLOCK = 1 << 17  # elements of a block: fixed, so that sums and bits never depend on budget
SPAN = 32  # blocks of one task for one thread


@dataclass(frozen=True)
class Job:
    """One output tensor: what it is made of and by which method. Without a method it is copied."""

    name: str
    spec: TensorSpec  # of the output
    merger: Any  # None: copy the first expert, which all others must equal
    base: Source | None
    experts: tuple[Source, ...]
    extras: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    layer: int | None = None
    labels: tuple[str, ...] = ()  # whose tensors: the base's label first if there is a base
    index: int = 0
    precise: bool = False  # float64, because a fold compares it with a tensor that needs it

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Base (if any) and experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @cached_property
    def facts(self) -> Facts:
        """The method's facts."""
        return facts(self.merger)

    @cached_property
    def wide(self) -> type:
        """Working precision: float64 if any input or the output is, else float32."""
        if self.precise:
            return np.float64
        kinds = {source.spec.dtype for source in self.sources} | {self.spec.dtype}
        return np.float64 if "F64" in kinds else np.float32

    @cached_property
    def packed(self) -> bool:
        """Whether kernels can take the inputs as they are in the files: all of them bfloat16."""
        if self.merger is None or self.extras or self.wide is not np.float32:
            return False
        return all(source.spec.dtype == "BF16" for source in self.sources)

    @cached_property
    def block(self) -> int:
        """Elements of one block of this tensor."""
        size = self.experts[0].spec.size
        if self.merger is None or self.facts.grain == "element":
            return BLOCK
        if self.facts.grain == "tensor":
            return max(size, 1)
        cols = max(columns(self.facts.grain, self.experts[0].spec.shape), 1)
        return max(BLOCK // cols, 1) * cols

    @cached_property
    def blocks(self) -> int:
        """How many blocks the tensor has; an empty tensor has none."""
        return -(-self.experts[0].spec.size // self.block)

    @cached_property
    def passes(self) -> int:
        """Least number of times its inputs are read: one a stage of folds, one to merge."""
        return 1 + (len(stages(self.merger)) if self.merger is not None else 0)

    @cached_property
    def whole_model(self) -> bool:
        """Whether its method must know something of all tensors before it can merge one."""
        todo = stages(self.merger) if self.merger is not None else ()
        return any(fold.scope == "model" for stage in todo for fold in stage.values())

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of its inputs, once."""
        return sum(source.spec.nbytes for source in self.sources)

    @cached_property
    def working_bytes(self) -> int:
        """Memory that one block of it takes while it is merged: inputs, results and temporaries."""
        size = min(self.block, max(self.experts[0].spec.size, 1))
        wide = np.dtype(self.wide).itemsize
        copies = len(self.sources) + 3
        if self.merger is not None and self.facts.grain == "tensor":
            copies = 3 * len(self.sources) + 4  # singular vectors and their workspace
        return size * (wide * copies + 2)


@dataclass(frozen=True)
class Plan:
    """Everything a run needs. Pickles, so that other machines can take part."""

    jobs: tuple[Job, ...]
    seed: int = 0
    layers: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    carry: Path | None = None  # model folder whose configuration and tokenizer go along
    config: Mapping[str, Any] = field(default_factory=dict)  # changes to its config.json
    warnings: Sequence[str] = ()
    files: str = ""  # digest of the small files that go beside the tensors

    def __post_init__(self) -> None:
        if len({job.wide for job in self.jobs}) > 1:
            jobs = tuple(replace(job, precise=job.whole_model) for job in self.jobs)
            object.__setattr__(self, "jobs", jobs)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The output's tensors."""
        return {job.name: job.spec for job in self.jobs}

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's tensors."""
        return sum(job.spec.nbytes for job in self.jobs)

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs over all passes that are certain."""
        return sum(job.bytes_read * job.passes for job in self.jobs)

    def digest(self) -> str:
        """Hash of all that decides the output's bits: recipe, seed, layout, input fingerprints."""
        state = xxhash.xxh3_128()
        state.update(repr((self.seed, self.layers, sorted(self.aliases.items()), BLOCK)).encode())
        state.update(self.files.encode())
        for job in self.jobs:
            told = (job.name, job.spec, repr(job.merger), job.layer, job.base is None, job.labels)
            state.update(repr(told).encode())
            for source in (*job.sources, *(s for group in job.extras.values() for s in group)):
                state.update(f"{source.spec}{source.fingerprint}".encode())
        return state.hexdigest()

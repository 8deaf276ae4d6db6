"""`ExpertBank`: one multi-task vector, and for every task the bits that say where it holds.

    theta_t = theta_0 + factor_t m_t tau_M       rounded once, to the base's type

Everything is lazy and streams block by block: a task is put together from base, vector and bits
when it is read; bits that were not saved yet are computed from the expert. With a residual the true
expert comes back bit for bit, whatever was predicted. Without vector and bits (`rule="none"`) the
base itself is the prediction.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pluribus.compress._residual import Corrected, Recast, spool
from pluribus.compress._store import (
    CHUNK,
    Split,
    Spool,
    check_base,
    identify,
    known_task,
    manifest,
    opened,
    saved,
    spans,
    split,
    staged,
    whole,
    wide_of,
    write_manifest,
)
from pluribus.core.bitmask import packed_size
from pluribus.core.dtypes import narrow
from pluribus.core.errors import InputError, MismatchError
from pluribus.core.source import Source, TensorSpec
from pluribus.core.weights import Weights, to_torch
from pluribus.merge.steps.consensus import tall_mask

Score = Callable[[str, Weights], float]
Rule = Literal["tall", "sign", "none"]
Rescale = Literal["sum", "mean"]


def flags(
    rule: Rule, base: np.ndarray, expert: np.ndarray, update: np.ndarray, mask_lambda: float
) -> np.ndarray:
    """Return where an expert keeps the multi-task vector, for one block of each."""
    if rule == "sign":
        return (expert - base) * update > 0
    return np.asarray(tall_mask(base, expert[None], update, mask_lambda)[0])


class Bits(Source):
    """A task's mask, packed, computed from the expert when it is read."""

    def __init__(
        self, rule: Rule, base: Source, multi: Source, expert: Source, mask_lambda: float
    ) -> None:
        self.rule: Rule = rule
        self.base, self.multi, self.expert = base, multi, expert
        self.mask_lambda = mask_lambda
        self.wide = wide_of(base, expert)
        self.spec = TensorSpec("U8", (packed_size(base.spec.size),))

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`; the elements are bytes of eight bits."""
        first, last = 8 * start, min(8 * stop, self.base.spec.size)
        base, multi, expert = (
            source.floats(first, last, self.wide) for source in (self.base, self.multi, self.expert)
        )
        out[...] = np.packbits(flags(self.rule, base, expert, multi, self.mask_lambda))


class Masked(Source):
    """base + factor * (mask * multi), rounded once; the base's own bytes where the mask is 0."""

    def __init__(
        self, base: Source, multi: Source, mask: Source, factor: float = 1.0, kind: str = ""
    ) -> None:
        self.base, self.multi, self.mask, self.factor = base, multi, mask, factor
        self.spec = TensorSpec(kind or base.spec.dtype, base.spec.shape)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`."""
        wide = wide_of(self, self.base)
        values = self.base.floats(start, stop, wide)
        first = start // 8
        bits = np.unpackbits(self.mask.load(first, packed_size(stop)), count=stop - 8 * first)
        kept = bits[start - 8 * first :].astype(bool)
        update = self.multi.floats(start, stop, wide)
        if self.factor != 1:
            update *= wide(self.factor)
        np.add(values, update, out=values, where=kept)
        out[...] = narrow(values, self.spec.kind)

    @property
    def fingerprint(self) -> str:
        """Those of its parts."""
        parts = (self.base.fingerprint, self.multi.fingerprint, self.mask.fingerprint)
        return f"masked {self.factor!r} {' '.join(parts)}"


@dataclass(frozen=True)
class Entry:
    """What a bank knows of one task."""

    masks: Weights
    own: Weights  # tensors kept as they are
    kinds: Mapping[str, str]  # element types of its tensors that differ from the base's
    mask_lambda: float | None = None
    factor: float = 1.0
    bytes: int = 0  # of its checkpoint
    residual: Weights | None = None  # what makes it exact, once it is stored
    expert: Weights | None = None  # the checkpoint itself, until the bank is saved


@dataclass(frozen=True)
class ExpertBank:
    """Experts as masks on one vector. `bank[task]` is an expert, lazily."""

    base: Weights
    multi: Weights
    entries: Mapping[str, Entry]
    method: str = "tall_masks"
    rule: Rule = "tall"
    exact: bool = False
    names: tuple[str, ...] = ()  # the shared tensors
    about: Mapping[str, Any] = field(default_factory=dict)  # parameters, for the manifest
    folder: Path | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names, in the order they were given."""
        return tuple(self.entries)

    def __getitem__(self, task: str) -> Weights:
        known_task(task, self.tasks)
        entry = self.entries[task]
        shared = {name: self._source(name, entry) for name in self.names}
        return whole(self.base, shared, entry.own, task)

    def expand(self, task: str) -> Weights:
        """Return one expert, lazily. Raises KeyError with the nearest task."""
        return self[task]

    def _source(self, name: str, entry: Entry) -> Source:
        if self.exact and entry.residual is not None:
            return Corrected.of(name, self._predicted(name, entry), entry.residual)
        if self.exact and entry.expert is not None:
            return entry.expert.source(name)
        return self._predicted(name, entry)

    def _predicted(self, name: str, entry: Entry) -> Source:
        base = self.base.source(name)
        kind = entry.kinds.get(name, base.spec.dtype) if self.exact else base.spec.dtype
        if self.rule == "none":
            return base if kind == base.spec.dtype else Recast(base, kind)
        multi, mask = self.multi.source(name), entry.masks.source(name)
        return Masked(base, multi, mask, entry.factor, kind)

    # -- using ------------------------------------------------------------------------------------

    def load_into(self, target: Any, task: str) -> list[str]:
        """Switch a module or state dict of torch tensors to a task, in place.

        Only tensors whose values differ are written; returns their names. Raises MismatchError,
        before anything is written, if the target lacks a tensor or has it in another shape.
        """
        import torch

        expert = self[task]
        state = target.state_dict() if hasattr(target, "state_dict") else target
        for name, spec in expert.spec.items():
            if name not in state or tuple(state[name].shape) != spec.shape:
                has = f"has shape {list(state[name].shape)}" if name in state else "is not there"
                raise MismatchError(f"tensor {name!r} is {spec} in {task}, but {has} in the target")
        written = []
        with torch.no_grad():
            for name in expert.spec:
                old = state[name]
                new = to_torch(expert.source(name)).to(old.device, old.dtype)
                if not _same_bits(old, new):
                    old.copy_(new)
                    written.append(name)
        return written

    def add(
        self,
        task: str,
        expert: Any,
        *,
        mask_lambda: float | Literal["validate", "l1"] = "l1",
        score: Score | None = None,
        grid: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6),
        freeze_multi: bool = True,
    ) -> "ExpertBank":
        """Return the bank with one more task, whose mask is computed against the same vector.

        A vector that knows the new task needs all experts again: `freeze_multi=False` says so.
        Raises InputError for a task that is there already.
        """
        if task in self.entries:
            raise InputError(f"the bank has a task {task!r} already; give the new one another name")
        if not freeze_multi:
            raise InputError(
                "a new multi-task vector needs the old experts: fit the bank again with all of "
                "them, or keep its vector (freeze_multi=True)"
            )
        parts = split(self.base, {task: expert}, tuple(self.about.get("exclude", ())))
        if set(parts.shared) != set(self.names):
            raise MismatchError(f"{task} does not share the tensors that the bank holds")
        rescale = self.about.get("rescale", "sum")
        bank = self._with(task, entry_of(parts, task, self.multi, self.rule, 1.0, rescale))
        if self.rule == "tall":
            value = chosen(bank, task, mask_lambda, grid, score)
            bank = self._with(task, entry_of(parts, task, self.multi, self.rule, value))
        return bank

    def _with(self, task: str, entry: Entry) -> "ExpertBank":
        return replace(self, entries={**self.entries, task: entry})

    def histogram(self) -> np.ndarray:
        """Return how many coordinates 0, 1, ... T tasks keep: from unused to universal ones."""
        counts = np.zeros(len(self.tasks) + 1, np.int64)
        for name in self.names if self.rule != "none" else ():
            size = self.base.source(name).spec.size
            for start, stop in spans(size):
                seen = np.zeros(stop - start, np.int32)
                for entry in self.entries.values():
                    raw = entry.masks.source(name).load(start // 8, packed_size(stop))
                    seen += np.unpackbits(raw, count=stop - start)
                counts += np.bincount(seen, minlength=counts.size)
        return counts

    # -- keeping ----------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the vector, the tasks' bits and a manifest; the base stays where it is.

        Raises OutputError if the folder exists.
        """
        with staged(folder, overwrite) as stage:
            self.write(stage, saved(self.multi, stage, "multi.safetensors"))

    def write(self, stage: Path, multi: str | None) -> None:
        """Write all but the vector, which is there under the name `multi`."""
        tasks = []
        for number, (task, entry) in enumerate(self.entries.items()):
            residual = None
            if self.exact:
                residual = self._write_residual(stage, f"exact-{number:03d}", entry)
            tasks.append(
                {
                    "name": task,
                    "masks": saved(entry.masks, stage, f"masks-{number:03d}.safetensors"),
                    "own": saved(entry.own, stage, f"own-{number:03d}.safetensors"),
                    "residual": residual,
                    "kinds": dict(entry.kinds),
                    "mask_lambda": entry.mask_lambda,
                    "factor": entry.factor,
                    "bytes": entry.bytes,
                }
            )
        table = {
            "kind": "bank",
            "method": self.method,
            "parameters": dict(self.about),
            "rule": self.rule,
            "exact": self.exact,
            "names": list(self.names),
            "multi": multi,
            "base": identify(self.base),
            "tasks": tasks,
        }
        write_manifest(stage, table)

    def _write_residual(self, stage: Path, stem: str, entry: Entry) -> str | None:
        if entry.expert is None:
            assert entry.residual is not None
            return saved(entry.residual, stage, f"{stem}.safetensors")
        into = Spool(stage / f"{stem}.raw")
        for name in self.names:
            spool(name, self._predicted(name, entry), entry.expert.source(name), into)
        return into.save(stage, f"{stem}.safetensors")

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], base: Any = None, *, verify: bool | None = None
    ) -> "ExpertBank":
        """Open a saved bank on its base; see `open_store`."""
        folder = Path(os.path.expanduser(folder))
        table = manifest(folder)
        base = Weights.open(table["base"]["label"] if base is None else base)
        check_base(base, table["base"], folder, verify)
        entries = {}
        for told in table["tasks"]:
            exact = told["residual"] is not None
            entries[told["name"]] = Entry(
                opened(folder, told["masks"]),
                opened(folder, told["own"]),
                told["kinds"],
                told["mask_lambda"],
                told["factor"],
                told["bytes"],
                opened(folder, told["residual"]) if exact else None,
            )
        return cls(
            base,
            opened(folder, table["multi"]),
            entries,
            table["method"],
            table["rule"],
            table["exact"],
            tuple(table["names"]),
            table["parameters"],
            folder,
        )

    def report(self) -> dict[str, Any]:
        """Return bytes of all parts, against those of the checkpoints, and the masks' densities.

        `ratio` is (base + store) / checkpoints.
        """
        tasks = {}
        for task, entry in self.entries.items():
            tasks[task] = {
                "bytes": entry.masks.nbytes + entry.own.nbytes
                + (entry.residual.nbytes if entry.residual is not None else 0),
                "own_bytes": entry.own.nbytes,
                "checkpoint_bytes": entry.bytes,
                "mask_lambda": entry.mask_lambda,
                "factor": entry.factor,
                "density": self._density(entry),
            }  # fmt: skip
        store = self.multi.nbytes + sum(told["bytes"] for told in tasks.values())
        checkpoints = sum(entry.bytes for entry in self.entries.values())
        counts = self.histogram()
        total = max(int(counts.sum()), 1)
        return {
            "method": self.method,
            "exact": self.exact,
            "base_bytes": self.base.nbytes,
            "multi_bytes": self.multi.nbytes,
            "store_bytes": store,
            "checkpoints_bytes": checkpoints,
            "ratio": (self.base.nbytes + store) / max(checkpoints, 1),
            "kept_by": [count / total for count in counts.tolist()],
            "tasks": tasks,
        }

    def _density(self, entry: Entry) -> float | None:
        if self.rule == "none":
            return None
        kept = 0
        for name in self.names:
            source = entry.masks.source(name)
            for start, stop in spans(source.spec.size):
                kept += int(np.bitwise_count(source.load(start, stop)).sum(dtype=np.int64))
        return kept / max(sum(self.base.source(name).spec.size for name in self.names), 1)


def _same_bits(one: Any, other: Any) -> bool:
    import torch

    if one.numel() == 0:
        return True
    words = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(*words)


# -- making ----------------------------------------------------------------------------------------


def entry_of(
    parts: Split,
    task: str,
    multi: Weights,
    rule: Rule,
    mask_lambda: float | None,
    rescale: Rescale = "sum",
) -> Entry:
    """Describe one task; nothing is read, except for the rule "sign", whose factor is a ratio."""
    expert, base = parts.experts[task], parts.base
    kinds = {
        name: expert.source(name).spec.dtype
        for name in parts.shared
        if expert.source(name).spec.dtype != base.source(name).spec.dtype
    }
    masks: dict[str, Source] = {}
    if rule != "none":
        masks = {
            name: Bits(
                rule, base.source(name), multi.source(name), expert.source(name), mask_lambda or 0.0
            )
            for name in parts.shared
        }
    factor = rescaler(parts, task, multi, rescale) if rule == "sign" else 1.0
    return Entry(
        Weights(masks, label=f"masks of {task}"),
        parts.own[task],
        kinds,
        mask_lambda if rule == "tall" else None,
        factor,
        expert.nbytes,
        None,
        expert,
    )


def rescaler(parts: Split, task: str, multi: Weights, rescale: Rescale) -> float:
    """Return sum |tau_t| / sum |m_t tau_M| over the model, what EMR multiplies a masked vector by.

    With "mean" the tensors' means are added up, so that small tensors count as much as large ones.
    """
    own = kept = 0.0
    for name in parts.shared:
        base, expert, vector = (w.source(name) for w in (parts.base, parts.experts[task], multi))
        wide = wide_of(base, expert)
        part = 1 / max(base.spec.size, 1) if rescale == "mean" else 1.0
        for start, stop in spans(base.spec.size):
            tau = expert.floats(start, stop, wide) - base.floats(start, stop, wide)
            update = vector.floats(start, stop, wide)
            own += part * float(np.abs(tau).sum(dtype=np.float64))
            kept += part * float(np.abs(update[tau * update > 0]).sum(dtype=np.float64))
    return own / kept if kept else 1.0


def chosen(
    bank: ExpertBank, task: str, mask_lambda: Any, grid: tuple[float, ...], score: Score | None
) -> float:
    """Return a task's threshold: as given, by its L1 error, or the first best score of the grid.

    Raises InputError if a score is needed and missing, or is not finite.
    """
    if mask_lambda == "l1":
        return 1.0  # |tau_t| > |tau_M - tau_t| elementwise is the exact minimiser
    if mask_lambda != "validate":
        return float(mask_lambda)
    if score is None:
        raise InputError(
            "mask_lambda = 'validate' needs score(task, weights), a number to maximise on that "
            "task's validation data; without data give 'l1', or a number such as 0.4"
        )
    best, most = grid[0], -np.inf
    entry = bank.entries[task]
    for value in grid:
        masks = {}
        for name in bank.names:
            bits = entry.masks.source(name)
            assert isinstance(bits, Bits)
            masks[name] = Bits(bits.rule, bits.base, bits.multi, bits.expert, value)
        tried = replace(bank, exact=False, entries={task: replace(entry, masks=Weights(masks))})
        found = float(score(task, tried[task]))
        if not np.isfinite(found):
            raise InputError(f"the score of {task} at mask_lambda = {value} is {found}")
        if found > most:
            best, most = value, found
    return best


def fit_bank(
    what: Any,
    base: Any,
    experts: Mapping[str, Any],
    multi: Any,
    rule: Rule,
    values: Mapping[str, Any] | Any,
    *,
    exclude: tuple[str, ...],
    exact: bool,
    grid: tuple[float, ...] = (),
    score: Score | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ExpertBank:
    """Build a bank: merge the vector, then describe (and with `out` write) every task."""
    from pluribus.compress._store import COMPRESSOR
    from pluribus.engine.provenance import parameters

    parts = split(base, experts, exclude)
    about = {**parameters(what), "exclude": list(exclude)}

    def made(vector: Weights) -> ExpertBank:
        names = parts.shared
        bank = ExpertBank(
            parts.base, vector, {}, getattr(what, COMPRESSOR).name, rule, exact, names, about
        )
        for task in parts.experts:
            value = values[task] if isinstance(values, Mapping) else values
            rescale = about.get("rescale", "sum")
            bank = bank._with(task, entry_of(parts, task, vector, rule, 1.0, rescale))
            if rule == "tall" and (found := chosen(bank, task, value, grid, score)) != 1.0:
                bank = bank._with(task, entry_of(parts, task, vector, rule, found))
        return bank

    if out is None:
        return made(vector_of(parts, multi, None, options))
    with staged(out, overwrite) as stage:
        where = stage / "multi.safetensors"
        made(vector_of(parts, multi, where, options)).write(stage, where.name if multi else None)
    return ExpertBank.open(out, parts.base)


def vector_of(parts: Split, multi: Any, out: Path | None, options: Mapping[str, Any]) -> Weights:
    """Merge the multi-task vector of the shared tensors, into memory or a file."""
    if multi is None:
        return Weights({})
    from pluribus.compress._update import Update
    from pluribus.core.pool import Pool
    from pluribus.engine.driver import merge

    pool = Pool(parts.of(parts.base), {t: parts.of(w) for t, w in parts.experts.items()})
    return merge(pool, Update(multi), out, **options)


assert CHUNK % 8 == 0

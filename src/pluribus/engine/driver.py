"""`merge`: plan, run, publish. The one way from models and a method to a merged model."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pluribus.core.depth import depth_map
from pluribus.core.dtypes import dtype as dtype_of
from pluribus.core.errors import InputError, OutputError
from pluribus.core.merger import facts
from pluribus.core.method import method_of
from pluribus.core.pool import Pool
from pluribus.core.source import TensorSpec
from pluribus.core.weights import Weights
from pluribus.engine import provenance
from pluribus.engine.plan import Job, Plan
from pluribus.engine.run import Progress, Run
from pluribus.engine.sink import FileSink, MemorySink


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a merge runs; none of it changes a bit of the result."""

    threads: int | None = None  # None: all processors
    memory: int = 512 << 20  # bytes for blocks in flight
    max_shard_size: int | None = 5_000_000_000  # bytes; None: one file
    device: str = "cpu"
    ray: bool = False
    overwrite: bool = False
    resume: bool = True
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class Result:
    """What a merge made: the weights (lazy if they went to disk) and how it went."""

    weights: Weights
    seconds: float
    bytes_read: int
    bytes_written: int
    resumed: bool = False
    out: Path | None = None
    warnings: tuple[str, ...] = ()


def size_of(text: str | int) -> int:
    """Read a size such as 512MB, 5GB, 2GiB or 1000000 (bytes).

    Raises InputError for anything else.
    """
    if isinstance(text, int):
        return text
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "B": 10**9}
    units |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
    word = text.strip().upper().replace(" ", "")
    bytes_word = word.removesuffix("B") if len(word) > 1 and not word[-2].isdigit() else word
    number = bytes_word.rstrip("KMGTIB")
    unit = bytes_word[len(number) :]
    try:
        if number.startswith("-"):
            raise ValueError("negative")
        return int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise InputError(f"{text!r} is not a size; write for example 512MB, 5GB or 2GiB") from None


def plan_pool(
    pool: Pool,
    method: Any,
    *,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    depth: Any = "auto",
) -> Plan:
    """Lay out the merge of a whole pool with one method.

    `dtype` is the element type that inputs are first rounded to, `out_dtype` that of the output
    (default: `dtype`, else the base's own). Raises InputError if the method does not fit the pool.
    """
    known = facts(method)
    check_inputs(known.name, method, pool)
    base = pool.base if known.base != "ignored" else None
    experts = list(pool.experts.values())
    labels = list(pool.experts)
    reference = pool.base if pool.base is not None else experts[0]
    names = set(pool.names)
    blocks = depth_map(reference.select(lambda name: name in names), depth)
    out = out_dtype or dtype
    jobs = []
    for index, name in enumerate(pool.names):
        spec = reference.source(name).spec
        sources = tuple(expert.source(name) for expert in experts)
        extras = {
            key: tuple(w.source(name) for w in group)
            for key, group in pool.extras.items()
            if key in known.needs and all(name in w for w in group)
        }
        kind = dtype_of(out).name if out and spec.kind.is_float else spec.dtype
        used = base.source(name) if base is not None else None
        if not spec.kind.is_float:
            models = pool.models
            sources, used = tuple(model.source(name) for model in models), None
            job_labels = tuple(model.label for model in models)
        else:
            job_labels = (*([] if base is None else [base.label]), *labels)
        jobs.append(
            Job(
                name,
                TensorSpec(kind, spec.shape),
                method if spec.kind.is_float else None,
                used,
                sources,
                extras if spec.kind.is_float else {},
                blocks.layers.get(name),
                job_labels,
                index,
            )
        )
    if all(job.merger is None for job in jobs):
        raise InputError("none of the models' tensors is floating point: there is nothing to merge")
    return Plan(
        tuple(jobs),
        seed,
        blocks.count,
        pool.aliases,
        {"merge_method": known.name, "parameters": provenance.parameters(method)},
        reference.folder,
        {"dtype": dtype_of(out).torch} if out else {},
        tuple(pool_warnings(pool, known)),
    )


def check_inputs(name: str, method: Any, pool: Pool) -> None:
    """Raise InputError if a method lacks a base, experts or further inputs it needs."""
    known = facts(method)
    count = len(pool.experts)
    if known.base == "required" and pool.base is None:
        raise InputError(f"{name} needs a base model; give base_model (or Pool(base, experts))")
    low, high = known.experts
    if count < low or (high is not None and count > high):
        wanted = f"{low}" if high == low else f"{low} or more" if high is None else f"{low}-{high}"
        beside = " beside the base" if known.base == "required" else ""
        raise InputError(f"{name} takes {wanted} model(s){beside}, but {count} were given")
    for need in known.needs:
        if need not in pool.extras:
            raise InputError(
                f"{name} needs '{need}' for every expert; compute it with pluribus.calibrate and "
                f"give it as extras={{'{need}': [...]}}"
            )


def pool_warnings(pool: Pool, known: Any) -> list[str]:
    """Return what is odd but usable about a pool."""
    notes = []
    if len(pool.experts) == 1 and known.experts[1] != 1:
        notes.append(f"{known.name}: a single expert was given; there is nothing to reconcile")
    if pool.base is not None:
        for label, expert in pool.experts.items():
            if all(
                expert.source(name).identity == pool.base.source(name).identity
                for name in pool.names
            ):
                notes.append(f"{label} is the base itself: it adds nothing to the merge")
    return notes


def merge(
    pool: Pool,
    method: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    depth: Any = "auto",
    options: Options | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **changes: Any,
) -> Weights:
    """Merge a pool with a method, in memory or (with `out`) straight to disk.

    `method` is a merger, a chain, or their text ("ties", "trim(density=0.2) >> elect >> mean");
    keyword arguments beyond the named ones are Options. `out` is a folder (shards, configuration
    and tokenizer) or a *.safetensors file. Returns the merged weights. Raises PluribusError with
    what was given and what to do; nothing that existed is harmed.
    """
    options = replace(options or Options(), **changes)
    plan = plan_pool(
        pool, method_of(method), dtype=dtype, out_dtype=out_dtype, seed=seed, depth=depth
    )
    return execute(plan, out, options, on_progress).weights


def execute(
    plan: Plan,
    out: str | os.PathLike[str] | None,
    options: Options,
    on_progress: Callable[[Progress], None] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Result:
    """Run a plan. `files` are small files to write beside the tensors, by name."""
    began = time.perf_counter()
    check_options(options)
    if out is None:
        memory = MemorySink(plan)
        progress = _run(plan, memory, options, on_progress)
        weights = memory.weights(plan, "merged")
        notes = (*plan.warnings, *provenance.twins(plan, memory.digests))
        return Result(
            weights,
            time.perf_counter() - began,
            progress.done,
            plan.bytes_written,
            warnings=notes,
        )
    path = target_of(out)
    token = plan.digest()
    if options.resume and provenance.plan_of(path) == token:
        FileSink.tidy(path)
        return Result(Weights.open(path), 0.0, 0, 0, True, path)
    sink = FileSink(
        plan,
        path,
        shard_bytes=options.max_shard_size,
        overwrite=options.overwrite,
        resume=options.resume,
        metadata={"pluribus": provenance.short(plan, token)},
    )
    resumed = bool(sink.digests)
    try:
        progress = _run(plan, sink, options, on_progress)
        record = provenance.record(plan, token, sink.digests)
        sink.publish({**provenance.carried(plan, path), **(files or {}), "pluribus.json": record})
    except BaseException:
        sink.abandon()
        raise
    finally:
        sink.close()
    return Result(
        Weights.open(path),
        time.perf_counter() - began,
        progress.done,
        plan.bytes_written,
        resumed,
        path,
        (*plan.warnings, *provenance.twins(plan, sink.digests)),
    )


def copy(
    weights: Weights,
    out: str | os.PathLike[str],
    options: Options | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **changes: Any,
) -> Result:
    """Write lazy weights (an expert of a store, a difference, a converted file) to disk.

    Streams on all threads, resumes and publishes like a merge. Keywords are Options. Raises
    OutputError if it would replace the model folder that the weights are read from.
    """
    path = target_of(out)
    if weights.folder is not None and path.exists() and path.samefile(weights.folder):
        raise OutputError(
            f"{out}: {weights.label} is read from there, and it would be replaced; choose another "
            "output"
        )
    jobs = [
        Job(name, spec, None, None, (weights.source(name),), {}, None, (weights.label,), index)
        for index, (name, spec) in enumerate(weights.spec.items())
    ]
    recipe = {"copy_of": weights.label}
    plan = Plan(
        tuple(jobs), aliases=weights.aliases, recipe=recipe, carry=weights.folder, warnings=()
    )
    return execute(plan, out, replace(options or Options(), **changes), on_progress)


def target_of(out: str | os.PathLike[str]) -> Path:
    """Return an output as a path with a name of its own. Raises OutputError for the root."""
    path = Path(os.path.expanduser(out))
    if path.name in ("", ".."):  # ".", "..", "/"
        path = path.resolve()
    if not path.name:
        raise OutputError(f"{path}: cannot be an output; name a folder or a .safetensors file")
    return path


def check_options(options: Options) -> None:
    """Raise InputError for options that cannot work, before anything is read or written."""
    if options.memory < 1_000_000:
        raise InputError(f"memory budget {options.memory} bytes: give at least 1MB")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads = {options.threads}: give at least 1")
    if options.max_shard_size is not None and options.max_shard_size < 1:
        raise InputError(f"max_shard_size = {options.max_shard_size} bytes: give for example 5GB")
    if options.device != "cpu" and not options.ray:  # a cluster has devices of its own
        from pluribus.engine.device import Uploader

        Uploader(options.device)


def _run(
    plan: Plan, sink: Any, options: Options, on_progress: Callable[[Progress], None] | None
) -> Progress:
    if options.ray:
        from pluribus.engine.ray_run import RayRun as Runner
    else:
        Runner = Run
    run = Runner(
        plan,
        sink,
        threads=options.threads,
        memory=options.memory,
        allow_nonfinite=options.allow_nonfinite,
        device=options.device,
    )
    run.run(on_progress)
    return run.progress


def merge_tensors(
    base: Any, experts: Sequence[Any] | Mapping[str, Any], method: Any, **keywords: Any
) -> dict[str, Any]:
    """Merge state dicts or modules in memory and return a state dict of torch tensors."""
    merged = merge(Pool(base, experts), method, None, **keywords)
    return {name: merged[name] for name in merged}


__all__ = ["Options", "OutputError", "Result", "execute", "merge", "merge_tensors", "plan_pool"]

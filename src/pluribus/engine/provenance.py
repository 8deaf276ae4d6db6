"""What an output says of itself: recipe, inputs and their content, versions; and how to check it.

The content digest of a tensor is xxh3-128 over the joined xxh3-128 hashes of its consecutive blocks
of `block` elements; a model's is the same over its tensors in name order. They are by-products of
the merge: every byte passes through the hash on its way.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pluribus import __version__
from pluribus.core.chain import Chain, text
from pluribus.core.errors import FormatError, MissingError
from pluribus.core.merger import FACTS
from pluribus.core.weights import Weights, carried_files
from pluribus.engine.blocks import OUT
from pluribus.engine.plan import SPAN, Plan
from pluribus.engine.run import Progress

NAME = "pluribus.json"
Digests = Mapping[tuple[int, int], Mapping[str, Sequence[str]]]


def parameters(method: Any) -> dict[str, Any]:
    """Return a method's parameters as plain values; nested methods as their text."""
    if isinstance(method, Chain) or not dataclasses.is_dataclass(method):
        return {"steps": str(method)}
    out = {}
    for item in dataclasses.fields(method):
        value = getattr(method, item.name)
        plain = value is None or isinstance(value, bool | int | float | str | tuple)
        out[item.name] = value if plain else text(value) if hasattr(value, FACTS) else str(value)
    return out


def short(plan: Plan, token: str) -> str:
    """Return the line that stands in each shard's own metadata."""
    return json.dumps(
        {"version": __version__, "plan": token, "recipe": plan.recipe, "seed": plan.seed},
        default=str,
    )


def record(plan: Plan, token: str, digests: Digests) -> bytes:
    """Return the text of pluribus.json for a finished plan."""
    tensors: dict[str, Any] = {}
    models = contents(plan, digests)
    written = models.pop(OUT, {})
    for job in plan.jobs:
        empty = xxhash.xxh3_128_hexdigest(b"")
        tensors[job.name] = {"block": job.block, "digest": written.get(job.name, empty)}
    inputs = {
        label: {"digest": _joined(found), "tensors": len(found)} for label, found in models.items()
    }
    table = {
        "pluribus": __version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "plan": token,
        "seed": plan.seed,
        "recipe": plan.recipe,
        "inputs": inputs,
        "output": {
            "digest": _joined({name: entry["digest"] for name, entry in tensors.items()}),
            "tensors": tensors,
        },
        "warnings": list(plan.warnings),
    }
    return json.dumps(table, indent=1, default=str).encode()


def contents(plan: Plan, digests: Digests) -> dict[str, dict[str, str]]:
    """Return the digest of every tensor of every input (by label) and of the output (OUT)."""
    models: dict[str, dict[str, str]] = {}
    for job in plan.jobs:
        spans = range(-(-job.blocks // SPAN))
        labels = {label for span in spans for label in digests[job.index, span]}
        for label in sorted(labels):
            joined = xxhash.xxh3_128()
            for span in spans:
                joined.update("".join(digests[job.index, span].get(label, [])).encode())
            models.setdefault(label, {})[job.name] = joined.hexdigest()
    return models


def twins(plan: Plan, digests: Digests) -> list[str]:
    """Return warnings about inputs whose content is the same, found on the way."""
    models = contents(plan, digests)
    models.pop(OUT, None)
    seen: dict[str, str] = {}
    notes = []
    for label, tensors in models.items():
        first = seen.setdefault(_joined(tensors), label)
        if first != label:
            notes.append(f"{label} and {first} hold the same values: one of them adds nothing")
    return notes


def _joined(found: Mapping[str, str]) -> str:
    state = xxhash.xxh3_128()
    for name in sorted(found):
        state.update(f"{name}\0{found[name]}\0".encode())
    return state.hexdigest()


def sidecar(path: Path) -> Path:
    """Return where the record of an output stands."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.name}.{NAME}")


def plan_of(path: Path) -> str | None:
    """Return the plan digest that a finished output carries, or None."""
    try:
        if path.is_dir():
            return json.loads((path / NAME).read_bytes()).get("plan")
        if path.is_file():
            return json.loads(Weights.open(path).metadata["pluribus"]).get("plan")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return None


def verify(
    path: str | Path, on_progress: Callable[[Progress], None] | None = None
) -> Iterator[tuple[str, str]]:
    """Check an output against its record, tensor by tensor; yield (tensor, fault) for each fault.

    Raises MissingError without a record, FormatError for a record that is not one.
    """
    path = Path(path)
    where = sidecar(path)
    if not path.exists():
        raise MissingError(f"{path}: no such file or folder")
    if not where.is_file():
        raise MissingError(f"{where}: not there; only outputs of pluribus can be verified")
    try:
        table = json.loads(where.read_bytes())
        tensors: Mapping[str, Any] = table["output"]["tensors"]
        blocks = {name: (int(entry["block"]), entry["digest"]) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{where}: not a record of pluribus ({error!r})") from None
    weights = Weights.open(path)
    progress = Progress(0, weights.nbytes)
    for name in weights.spec:
        if name not in blocks:
            yield name, "is not in the record"
    for name, (block, wanted) in blocks.items():
        if name not in weights.spec:
            yield name, "is missing"
            continue
        source = weights.source(name)
        joined = xxhash.xxh3_128()
        for start in range(0, source.spec.size, block):
            raw = source.load(start, min(start + block, source.spec.size))
            joined.update(xxhash.xxh3_128_hexdigest(memoryview(raw)).encode())
            progress.done += raw.nbytes
            if on_progress is not None:
                on_progress(progress)
        if joined.hexdigest() != wanted:
            yield name, "differs from what was written"


def carried(plan: Plan, out: Path) -> dict[str, bytes]:
    """Return the model folder's files that go along, with `plan.config` worked into config.json."""
    if plan.carry is None or out.name.endswith(".safetensors"):
        return {}
    found = {entry.name: entry.read_bytes() for entry in carried_files(plan.carry)}
    if plan.config and "config.json" in found:
        config = json.loads(found["config.json"])
        changes = dict(plan.config)
        if "dtype" in changes and "torch_dtype" in config and "dtype" not in config:
            changes["torch_dtype"] = changes.pop("dtype")
        config.update(changes)
        found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found


def recipe_seed(text: str) -> int:
    """Return the seed that a recipe gets if it names none: a hash of its text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])

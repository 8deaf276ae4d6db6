"""Small pools on disk, an oracle, small blocks, tiny disks and child processes for the engine."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401  (before pluribus, whose annotations then allow for it)

import pluribus
from pluribus.core import order
from pluribus.core.dtypes import dtype, narrow
from pluribus.core.merger import facts
from pluribus.core.pool import Pool
from pluribus.core.source import ArraySource, TensorSpec
from pluribus.core.weights import Weights
from pluribus.engine import blocks, plan, provenance, reference, run
from pluribus.engine.blocks import Reader
from pluribus.engine.driver import plan_pool

SHAPES = {
    "embed.weight": (37, 19),
    "scalar": (),
    "empty": (0, 5),
    "layers.0.weight": (23, 8),
    "layers.1.weight": (23, 8),
    "norm.weight": (23,),
    "one": (1,),
}


def arrays(
    shapes: Mapping[str, Sequence[int]], seed: int, kind: str | Mapping[str, str] = "F32"
) -> dict[str, ArraySource]:
    """Draw weights; `kind` is an element type, or one for each name."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        about = dtype(kind if isinstance(kind, str) else kind[name])
        spec = TensorSpec(about.name, tuple(shape))
        if about.is_float:
            values = rng.standard_normal(shape) / 4
            wide = np.float64 if about.name == "F64" else np.float32
            raw = narrow(np.asarray(values, wide), about)
        else:
            raw = (np.arange(spec.size) % 128).astype(about.numpy).view(np.uint8)
        out[name] = ArraySource(raw, spec)
    return out


class Models:
    """Writes `base`, `e0`, `e1`, ... into a folder and opens them as pools."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        experts: int = 3,
        shapes: Mapping[str, Sequence[int]] = SHAPES,
        kinds: Sequence[str | Mapping[str, str]] = ("F32",),
    ) -> Pool:
        """Write a pool; `kinds` go round over base and experts."""
        self.names = ["base", *(f"e{i}" for i in range(experts))]
        for number, name in enumerate(self.names):
            kind = kinds[number % len(kinds)]
            (self.folder / name).mkdir(exist_ok=True)
            Weights(arrays(shapes, number, kind)).save(self.folder / name / "model.safetensors")
            (self.folder / name / "config.json").write_text(json.dumps({"model_type": "toy"}))
        return self.pool()

    def pool(self, *, base: bool = True) -> Pool:
        """Open the pool that was written."""
        experts = {name: self.folder / name for name in self.names[1:]}
        return Pool(self.folder / "base" if base else None, experts)

    def in_memory(self) -> Pool:
        """The same pool as arrays."""

        def held(weights: Weights) -> Weights:
            sources = {
                name: ArraySource(weights.source(name).load(), spec)
                for name, spec in weights.spec.items()
            }
            return Weights(sources, label=weights.label, aliases=weights.aliases)

        pool = self.pool()
        experts = {name: held(expert) for name, expert in pool.experts.items()}
        return Pool(held(pool.base), experts)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 elements, spans of 2, radix selection from 48: many of each in tiny tensors."""
    for module in (plan, blocks, run, provenance):
        monkeypatch.setattr(module, "SPAN", 2)
    monkeypatch.setattr(plan, "BLOCK", 64)
    monkeypatch.setattr(order, "SMALL", 48)


def expected(pool: Pool, method: Any, *, seed: int = 0) -> dict[str, bytes]:
    """The reference merge, rounded to the output's types: bytes by name."""
    jobs = plan_pool(pool, method, seed=seed).jobs
    depth = {job.name: job.layer for job in jobs if job.layer is not None}
    floats = [job for job in jobs if job.merger is not None]
    models = [pool.base, *pool.experts.values()] if pool.base else list(pool.experts.values())

    def wide(model: Weights) -> dict[str, np.ndarray]:
        return {
            job.name: model.source(job.name)
            .floats(wide=job.wide)
            .reshape(model.source(job.name).spec.shape)
            for job in floats
        }

    opened = [wide(model) for model in models]
    base = opened.pop(0) if pool.base else None
    if facts(method).base == "ignored":
        base = None
    extras = {key: [wide(model) for model in group] for key, group in pool.extras.items()}
    merged = reference.merge_arrays(method, base, opened, extras, seed=seed, depth=depth)
    out = {job.name: Reader().encode(merged[job.name], job).tobytes() for job in floats}
    for job in jobs:
        if job.merger is None:
            out[job.name] = job.experts[0].load().tobytes()
    return out


@pytest.fixture
def oracle() -> Callable[..., dict[str, bytes]]:
    return expected


def raw(weights: Weights) -> dict[str, bytes]:
    """Bytes of every tensor that is kept."""
    return {name: weights.source(name).load().tobytes() for name in weights.spec}


@pytest.fixture
def raw_bytes() -> Callable[[Weights], dict[str, bytes]]:
    return raw


def digest(out: Path) -> dict[str, str]:
    """SHA-256 of every file of an output, by its path."""
    found = sorted(p for p in out.rglob("*") if p.is_file()) if out.is_dir() else [out]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.fixture
def sha() -> Callable[[Path], dict[str, str]]:
    return digest


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a filesystem of a given size, where that is permitted."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = []

    def mount(size: str, *options: str) -> Path:
        text = ",".join([f"size={size}", *options])
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", text, "tmpfs", str(where)],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small tmpfs is not permitted here")
        mounted.append(where)
        return where

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python code in a process that finds this pluribus; ends it with the test."""
    source = str(Path(pluribus.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    started: list[subprocess.Popen] = []

    def start(code: str, *arguments: object) -> subprocess.Popen:
        # A shell may have started the tests in the background, where SIGINT is ignored.
        ready = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        process = subprocess.Popen(
            [sys.executable, "-c", ready + code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()

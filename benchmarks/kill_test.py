"""Kill a merge at random points, again and again; the same command must end with the same bytes.

    python benchmarks/kill_test.py --kills 100            # the library, in a process of its own
    python benchmarks/kill_test.py --kills 100 --cli      # `pluribus merge`

Generates a bf16 pool (a base and two experts), merges it undisturbed with TIES, trimmed by tensor
and by model, and notes the hash of every file. Then it starts the same merge, sends SIGKILL after a
random time, starts the same command, which goes on (a quarter of these are killed too, and so on);
what then stands there is compared. Prints a summary as JSON; the exit status is 1 if any byte
differed or a run failed.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

SNIPPET = """
import sys
from pluribus.core.pool import Pool
from pluribus.engine.driver import merge
from pluribus.merge.ties import Ties
folder, scope, out, shard, overwrite = sys.argv[1:]
models = [f"{folder}/{name}" for name in ("base", "e0", "e1")]
merge(Pool(models[0], models[1:]), Ties(density=0.2, scope=scope), out, threads=2,
      max_shard_size=int(shard), overwrite=bool(int(overwrite)))
"""
CLI = "from pluribus.cli import main; main()"


def generate(folder: Path, megabytes: float) -> int:
    """Write base, e0 and e1 of together so many MB; return the bytes of one."""
    from pluribus.core.source import ArraySource, TensorSpec
    from pluribus.core.weights import Weights

    total = int(megabytes * 1e6 / 3 / 2)  # elements of one model
    shapes = {"embed.weight": (total // 3 // 64, 64), "norm.weight": (64,)}
    for layer in range(8):
        shapes[f"layers.{layer}.weight"] = (total * 2 // 3 // 8 // 64, 64)
    for number, name in enumerate(("base", "e0", "e1")):
        rng = np.random.default_rng(number)
        sources = {}
        for key, shape in shapes.items():
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            # The upper halves of float32 words are valid bf16 numbers.
            raw = (values.view(np.uint32) >> 16).astype(np.uint16)
            sources[key] = ArraySource(raw, TensorSpec("BF16", shape))
        (folder / name).mkdir(parents=True)
        Weights(sources).save(folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"model_type": "toy"}')
    return Weights.open(folder / "base").nbytes


def command(folder: Path, scope: str, out: Path, shard: int, overwrite: bool, cli: bool):
    if not cli:
        given = [str(folder), scope, str(out), str(shard), str(int(overwrite))]
        return [sys.executable, "-c", SNIPPET, *given]
    recipe = folder / f"{scope}.yml"
    if not recipe.exists():
        models = [{"model": str(folder / name)} for name in ("e0", "e1")]
        text = {
            "merge_method": "ties",
            "base_model": str(folder / "base"),
            "models": models,
            "parameters": {"density": 0.2, "scope": scope},
        }
        recipe.write_text(json.dumps(text))  # JSON is YAML
    more = ["--overwrite"] if overwrite else []
    options = ["--threads", "2", "--max-shard-size", str(shard), "--quiet", *more]
    return [sys.executable, "-c", CLI, "merge", str(recipe), str(out), *options]


def hashes(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def start(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen, path: Path) -> None:
    """Return once the process has opened its journal (or ended)."""
    while process.poll() is None and not path.exists():
        time.sleep(0.0005)


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run failed with status {process.returncode}:\n{said.decode()}")


def undisturbed(words: list[str], out: Path) -> tuple[dict[str, str], float]:
    """Return the hashes of a run that nobody kills, and the seconds from its first byte on."""
    process = start(words)
    wait_for(process, out.with_name(out.name + ".partial") / "journal")
    began = time.perf_counter()
    finish(process)
    return hashes(out), time.perf_counter() - began


class Trial:
    """Kills and goes on until so many outputs are compared."""

    def __init__(self, words: list[str], out: Path, wanted: dict[str, str], seconds: float) -> None:
        self.words, self.out, self.wanted, self.seconds = words, out, wanted, seconds
        self.stage = out.with_name(out.name + ".partial")
        self.seen: Counter[str] = Counter()
        self.most = 0  # spans that one run left to the next

    def run(self, outputs: int, old: Path | None, draw: random.Random) -> None:
        while self.seen["outputs compared"] < outputs:
            for path in (self.out, self.stage):
                shutil.rmtree(path, ignore_errors=True)
            if old is not None:
                shutil.copytree(old, self.out)
            before, killed = hashes(self.out), self.seen["kills"]
            while not self._through(draw, before) and draw.random() < 0.25:
                pass  # a quarter of the runs that go on are killed as well
            if self.seen["kills"] == killed:
                continue  # it got through: nothing to go on from
            finish(start(self.words))  # a finished output is recognised, too
            self.seen["outputs compared"] += 1
            self.seen["differences"] += hashes(self.out) != self.wanted
            self.seen["left behind"] += self.stage.exists()

    def _through(self, draw: random.Random, before: dict[str, str]) -> bool:
        """Start the command and kill it at a random point; return whether it got through."""
        process = start(self.words)
        # Half of the kills come after a time drawn from the whole run, half after a span is noted.
        journal = self.stage / "journal"
        wait_for(process, journal)
        noted = journal.stat().st_size if journal.exists() else 0
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, self.seconds * 1.2))
        else:
            goal = noted + draw.randrange(1, 4000)
            while process.poll() is None and _size(journal) < goal:
                time.sleep(0.0002)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == 0:
            return True
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"a run failed with {process.returncode}:\n{said.decode()}")
        self.seen["kills"] += 1
        self._look(before)
        return False

    def _look(self, before: dict[str, str]) -> None:
        """Check what stands under the output's name after a kill."""
        now = hashes(self.out)
        now.pop("journal", None)  # removed by the next run
        if now == self.wanted:
            self.seen["kills once the output was whole"] += 1
        elif now != before and not self.out.with_name(self.out.name + ".replaced").exists():
            self.seen["differences"] += 1
        journal = self.stage / "journal"
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        self.seen["kills with work to go on from"] += lines > 1
        self.most = max(self.most, lines - 1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 1 << 62


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="outputs to compare")
    parser.add_argument("--mb", type=float, default=60, help="size of the pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cli", action="store_true", help="run `pluribus merge`")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    import pluribus

    source = str(Path(pluribus.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    draw = random.Random(given.seed)
    began = time.perf_counter()
    total: Counter[str] = Counter()
    runs = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        size = generate(folder, given.mb)
        shard = size // 3
        plans = [("tensor", False), ("model", False), ("tensor", True), ("model", True)]
        for number, (scope, overwrite) in enumerate(plans):
            out = folder / f"out-{number}"
            words = command(folder, scope, out, shard, overwrite, given.cli)
            undisturbed(words, out)  # compiles what is not compiled yet
            shutil.rmtree(out)
            wanted, seconds = undisturbed(words, out)
            old = None
            if overwrite:
                old = folder / "old"
                shutil.rmtree(old, ignore_errors=True)
                shutil.copytree(folder / "base", old)
            trial = Trial(words, out, wanted, seconds)
            # Of the outputs asked for, this plan's part.
            share = given.kills * (number + 1) // len(plans) - given.kills * number // len(plans)
            trial.run(share, old, draw)
            runs[f"{scope}{', overwriting' if overwrite else ''}"] = {
                **trial.seen,
                "spans handed on at most": trial.most,
                "seconds undisturbed": round(seconds, 3),
                "files": len(wanted),
            }
            total += trial.seen
    ok = not total["differences"] and not total["left behind"]
    summary = {
        "kills": total["kills"],
        "outputs_compared": total["outputs compared"],
        "differences": total["differences"],
        "left_behind": total["left behind"],
        "ok": ok,
        "through": "cli" if given.cli else "library",
        "pool_mb": round(3 * size / 1e6, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": given.seed,
        "runs": runs,
        "pluribus": pluribus.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(summary, indent=1))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()

"""`pluribus inspect` on a base and three experts, as a whole process, beside the time to read them.

    python benchmarks/inspect_speed.py --size 0.36 --out benchmarks/results/inspect_speed.json

Generates the checkpoints of merge_speed.py (bf16, Llama shape) in a temporary folder, which goes
afterwards, and runs in turn: the floor (reading all files with plain system calls), `inspect`, and
once `inspect --spectra` and `diff`. Prints wall time, the ratio to the floor and peak memory: with
the files on disk alone (they are dropped from the page cache before each run), and with the files
in the page cache, where the floor is a copy in memory.
Nothing else should run on the machine; what else it is doing is told by the load beside each run.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from merge_speed import SHAPES, generate, timed

READ = """
import sys
buffer = bytearray(8 << 20)
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--size", type=float, default=0.36, choices=sorted(SHAPES))
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--threads", type=int, help="of inspect; default: all processors")
    arguments.add_argument("--spectra", action="store_true", help="also run it with --spectra")
    arguments.add_argument("--dir", type=Path, help="where the temporary folder is made")
    arguments.add_argument("--out", type=Path, help="write the results as JSON")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        folder = Path(temporary)
        # In a process of its own: children inherit the peak memory of the one that starts them.
        maker = multiprocessing.get_context("spawn").Process(
            target=generate, args=(folder, options.size)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"generating {folder} failed")
        models = [str(folder / name) for name in ("base", "e0", "e1", "e2")]
        result = measure(models, options)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def drop(names: list[str]) -> None:
    """Take files out of the page cache, so that they are read from disk again."""
    for name in names:
        handle = os.open(name, os.O_RDONLY)
        try:
            os.fsync(handle)  # what was not written yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def measure(models: list[str], options: argparse.Namespace) -> dict:
    """Return times and peaks of all runs."""
    files = [f"{model}/model.safetensors" for model in models]
    size = sum(os.path.getsize(name) for name in files)
    own = [sys.executable, "-m", "pluribus"]
    threads = ["--threads", str(options.threads)] if options.threads else []
    inspect = [*own, "inspect", *models, "--quiet", "--json", *threads]
    reading = [sys.executable, "-c", READ, *files]
    found: dict[str, list[float]] = {}
    peaks, loads = [], []
    for _ in range(options.runs):  # in turn: a machine has fast and slow minutes
        loads.append(round(os.getloadavg()[0], 2))
        for state, prepare in (("from disk", drop), ("cached", lambda names: timed(reading))):
            for name, command in (("floor", reading), ("inspect", inspect)):
                prepare(files)
                seconds, peak = timed(command)
                found.setdefault(f"{state}: {name}", []).append(round(seconds, 3))
                peaks += [peak] if name == "inspect" else []
    row = {
        "command": "pluribus inspect base e0 e1 e2",
        "size_b": options.size,
        "gigabytes": round(size / 1e9, 2),
        "runs": options.runs,
        "seconds": {name: statistics.median(values) for name, values in found.items()},
        "over_the_floor": {
            state: round(
                statistics.median(found[f"{state}: inspect"])
                / statistics.median(found[f"{state}: floor"]),
                2,
            )
            for state in ("from disk", "cached")
        },
        "peak_mb": round(max(peaks), 1),
        "all_seconds": found,
        "load_before": loads,
    }
    seconds, peak = timed([*own, "diff", *models[:2], "--quiet", "--json"])
    row |= {"diff_s": round(seconds, 2), "diff_peak_mb": round(peak, 1)}
    if options.spectra:
        seconds, peak = timed([*inspect, "--spectra"])
        row |= {"spectra_s": round(seconds, 1), "spectra_peak_mb": round(peak, 1)}
    return {
        **row,
        "machine": {
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "platform": platform.machine(),
        },
    }


if __name__ == "__main__":
    main()

"""Kill a search at random points, again and again; it must end as an undisturbed one.

    python benchmarks/search_kill.py --rounds 20             # recipes on demo8, `pluribus search`
    PLURIBUS_DATA=... python benchmarks/search_kill.py --rounds 1 --algorithms evolution \
        --space examples/search/vision8.yml --keep vision8.sqlite

For each algorithm: a search of 60 recipes without a store, noted trial by trial. Then, `--rounds`
times, the same search with a store: the command is started, killed with SIGKILL after a random
time, started again, and so on, until it comes to its end; each of its trials is compared (point,
seed, score to the last bit), and SQLite checks its file. Prints a summary as JSON; the exit status
is 1 if anything differed or a run failed.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLI = "from pluribus.cli import main; main()"
SPACE = Path(__file__).parents[1] / "examples" / "search" / "demo8.yml"


def command(given: argparse.Namespace, algorithm: str, store: Path | None) -> list[str]:
    line = [sys.executable, "-c", CLI, "search", str(given.space), "--json", "--quiet"]
    line += ["--trials", str(given.trials), "--algorithm", algorithm, "--seed", str(given.seed)]
    return line + ([] if store is None else ["--store", str(store)])


def told(output: str) -> list[tuple]:
    keys = ("number", "dna", "seed", "status", "scores", "error")
    return [tuple(json.dumps(t[key]) for key in keys) for t in json.loads(output)["trials"]]


def whole(line: list[str]) -> tuple[list[tuple], float]:
    began = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)}: {done.stderr}")
    return told(done.stdout), time.perf_counter() - began


def disturbed(line: list[str], store: Path, most: float, rng: random.Random) -> tuple[list, int]:
    """Run until the end, killed after up to `most` seconds each time; return trials and kills."""
    kills, before = 0, -1
    while True:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # Longer each time that nothing was got done: a kill while it starts up is one, too.
        patience = rng.uniform(0, most) * (1 if finished(store) > before else 3)
        before = finished(store)
        try:
            output, errors = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        if process.returncode:
            sys.exit(f"{' '.join(line)}: {errors}")
        return told(output), kills


def finished(store: Path) -> int:
    if not store.exists():
        return 0
    base = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
    try:
        return base.execute("SELECT count(*) FROM trials WHERE status != 'running'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        base.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--algorithms", default="evolution,cma,tpe,random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--space", type=Path, default=SPACE)
    parser.add_argument("--keep", type=Path, help="copy the last round's store here")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    rows, wrong = [], 0
    for algorithm in given.algorithms.split(","):
        expected, seconds = whole(command(given, algorithm, None))
        kills, differing, broken = 0, 0, 0
        for _ in range(given.rounds):
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder) / "study.sqlite"
                line = command(given, algorithm, store)
                found, count = disturbed(line, store, 0.6 * seconds, rng)
                kills += count
                differing += sum(a != b for a, b in zip(found, expected, strict=True))
                base = sqlite3.connect(store)
                broken += base.execute("PRAGMA integrity_check").fetchone() != ("ok",)
                base.close()
                if given.keep:
                    shutil.copy(store, given.keep)
        wrong += differing + broken
        rows.append(
            {
                "algorithm": algorithm,
                "trials": given.trials,
                "rounds": given.rounds,
                "kills": kills,
                "trials_that_differ": differing,
                "stores_that_are_broken": broken,
                "undisturbed_s": round(seconds, 1),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    told = {"space": given.space.name, "rows": rows}
    told |= {"python": platform.python_version(), "processors": os.cpu_count()}
    print(json.dumps(told, indent=1))
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

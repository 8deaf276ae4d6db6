"""Train all 729 cells of `pluribus.claims._cells` once; the table that ships with the claims.

    PLURIBUS_DATA=... python benchmarks/nas_table.py cells.jsonl --seconds 60    as often as needed
    python benchmarks/nas_table.py cells.jsonl --pack nas_fashion.npz            once all are there

A line is written as soon as a cell is done, so a run may end at any moment; a half-written last
line is cut off and its cell is done again. One thread, seed 0: the same figures on one machine.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pluribus.claims import _cells


def finished(path: Path) -> dict[int, dict]:
    """Read what is there, and cut off a line that was not finished."""
    if not path.exists():
        return {}
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        path.write_bytes(whole + newline)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["row"]: row for row in rows}


def measure(dna, space, training, test) -> dict:
    point = space.decode(dna)
    began = time.process_time()
    module = training.fitted(point)
    seconds = time.process_time() - began
    counter = FlopCounterMode(display=False)
    module.eval()
    with counter, torch.no_grad():
        module(test.x[:1])
    return {
        "row": _cells.row(dna),
        "choices": list(dna.to_numbers()),
        "val_right": round(training.scored(module, training.val) * len(training.val.x)),
        "test_right": round(training.scored(module, test) * len(test.x)),
        "parameters": sum(p.numel() for p in module.parameters()),
        "flops": counter.get_total_flops(),
        "seconds": round(seconds, 3),
    }


def fill(path: Path, seconds: float, part: int, parts: int) -> int:
    """Measure cells until the time is up; return how many are left."""
    torch.set_num_threads(1)  # part of the result: another count sums in another order
    space, training, test = _cells.space(), _cells.training(), _cells.fashion()["test"]
    there, began, left = finished(path), time.perf_counter(), 0
    for number, dna in enumerate(space.spec.iter_dna()):
        if number % parts != part or _cells.row(dna) in there:
            continue
        if time.perf_counter() - began >= seconds:
            left += 1
            continue
        line = json.dumps(measure(dna, space, training, test))
        with path.open("a") as file:
            file.write(line + "\n")
    return left


def pack(paths: list[Path], out: Path) -> None:
    rows = {number: row for path in paths for number, row in finished(path).items()}
    if sorted(rows) != list(range(3**6)):
        sys.exit(f"{len(rows)} of {3**6} cells are measured; run without --pack until all are")
    ordered = [rows[number] for number in range(3**6)]
    data = _cells.fashion()
    told = {
        "seed": 0,
        "epochs": 1,
        "train_images": len(data["train"].x),
        "val_images": len(data["val"].x),
        "test_images": len(data["test"].x),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    with out.open("wb") as file:
        np.savez_compressed(
            file,
            made_with=np.array(json.dumps(told)),
            val_right=np.array([row["val_right"] for row in ordered], np.uint16),
            test_right=np.array([row["test_right"] for row in ordered], np.uint16),
            parameters=np.array([row["parameters"] for row in ordered], np.uint32),
            flops=np.array([row["flops"] for row in ordered], np.uint32),
            seconds=np.array([row["seconds"] for row in ordered], np.float32),
        )
    print(f"{out}: {out.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train all cells of the micro-space")
    parser.add_argument("rows", type=Path, nargs="+", help="JSON lines; several to pack")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--part", default="0/1", help="i/n: only cells i, i + n, ...")
    parser.add_argument("--pack", type=Path, help="write the table")
    options = parser.parse_args()
    if options.pack:
        pack(options.rows, options.pack)
    else:
        part, parts = map(int, options.part.split("/"))
        left = fill(options.rows[0], options.seconds, part, parts)
        print(f"{left} cells left")
        sys.exit(3 if left else 0)


if __name__ == "__main__":
    main()

"""Measure the pools that the advice of `inspect` is calibrated on, and write the data it reads.

    python benchmarks/calibrate_advice.py --beds vision6,vision8 --seeds 0,1,2
    python benchmarks/calibrate_advice.py --kept --write src/pluribus/inspect/calibration.json

Zoos are read from the cache folder or trained, which takes hours; measured pools are kept there
too, so that a run that was ended goes on, and several processes may run at once: they share out the
beds. With `--kept` nothing more is measured.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    from pluribus.inspect.beds import BEDS

    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--beds", default=",".join(BEDS))
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--kept", action="store_true", help="take what was measured before")
    arguments.add_argument("--write", type=Path, help="write the package's data file")
    options = arguments.parse_args()
    import numpy
    import torch

    from pluribus import __version__
    from pluribus.core.whole import whole_file
    from pluribus.inspect.calibrate import CANDIDATES, DENSITY, kept, measure_beds

    torch.set_num_threads(options.threads)
    beds = [BEDS[name] for name in options.beds.split(",")]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.kept:
        measured = {(bed.name, seed): kept(bed, seed) for seed in seeds for bed in beds}
    else:
        began = time.perf_counter()
        measured = measure_beds(
            beds,
            seeds,
            lambda bed, done, of: print(
                f"{bed}: {done}/{of}, after {time.perf_counter() - began:.0f} s", flush=True
            ),
        )
    found = [pool for seed in seeds for bed in beds for pool in measured[bed.name, seed]]
    if options.write:
        versions = {"pluribus": __version__, "torch": torch.__version__, "numpy": numpy.__version__}
        told = {
            "made_by": "benchmarks/calibrate_advice.py",
            "versions": versions | {"python": platform.python_version()},
            "candidates": list(CANDIDATES),
            "density": DENSITY,
            "pools": [_short(asdict(pool)) for pool in found],
        }
        rows = ",\n".join("  " + json.dumps(pool) for pool in told.pop("pools"))
        lines = json.dumps(told, indent=1)[:-2] + f',\n "pools": [\n{rows}\n ]\n}}'
        with whole_file(options.write) as part:
            part.write_text(lines + "\n")
        print(f"{options.write}: {len(found)} pools, {len(lines) / 1000:.1f} kB")


def _short(told: dict) -> dict:
    """Round, and write losses in the order of the candidates: the file ships with the package."""
    told["features"] = {name: round(value, 4) for name, value in told["features"].items()}
    told["loss"] = [round(value, 4) for value in told["loss"].values()]
    told |= {name: round(told[name], 4) for name in ("base", "rules")}
    del told["test"], told["rules_test"]  # for the claim alone
    return told


if __name__ == "__main__":
    main()

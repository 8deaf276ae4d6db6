"""Error of pluribus and of mergekit against float64, method by method, in float32 and bfloat16.

    python benchmarks/merge_error.py --mergekit .venv-mergekit/bin/python

Both merge the same small tensors; the reference is mergekit's own method in float64 on the same
numbers. In bfloat16 mergekit computes in bfloat16, as it does for such models by default; pluribus
computes in float32 and rounds once. Random methods stand at density 1, where nothing is drawn.
Elements where pluribus in float64 differs from the reference are left out (their share is printed):
at a cut, among equally large updates, each program keeps others. Weights are chosen so that no vote
is tied, which would be decided by rounding.
Errors are root mean squares over the elements, and the largest; the exit status is 1 if that of
pluribus is above mergekit's anywhere (by more than a hundredth).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

W = [0.7313, 0.2171, 0.4057]  # no vote is tied: no small multiples of them add up to each other
CASES = {  # method: (parameters, experts, with a base)
    "linear": ({"weight": W}, 3, False),
    "slerp": ({"t": 0.4}, 1, True),
    "nuslerp": ({"weight": [0.2963, 0.9071]}, 2, True),
    "multislerp": ({"weight": W}, 3, True),
    "karcher": ({}, 3, False),
    "task_arithmetic": ({"weight": W}, 3, True),
    "ties": ({"weight": W, "density": 0.2}, 3, True),
    "dare_linear": ({"weight": W}, 3, True),
    "dare_ties": ({"weight": W}, 3, True),
    "della": ({"weight": W}, 3, True),
    "della_linear": ({"weight": W}, 3, True),
    "breadcrumbs": ({"weight": W, "density": 0.5, "gamma": 0.05}, 3, True),
    "breadcrumbs_ties": ({"weight": W, "density": 0.5, "gamma": 0.05}, 3, True),
    "sce": ({"select_topk": 0.3}, 3, True),
    "ram": ({}, 3, True),
    "ramplus_tl": ({}, 3, True),
    "model_stock": ({}, 3, True),
    "nearswap": ({"t": 0.001}, 1, True),
    "arcee_fusion": ({}, 1, True),
}
PEER = """
import json, sys
import numpy as np, torch
from mergekit.merge_methods import merge_tensors
torch.set_num_threads(1)
arrays = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
out = {}
for method, (parameters, experts, base) in json.loads(sys.argv[3]).items():
    for kind in ("float32", "bfloat16"):
        rows = [arrays[f"{kind}/{k}"] for k in range(experts)]
        if base:
            rows.insert(0, arrays[f"{kind}/base"])
        for name, dtype in (("own", getattr(torch, kind)), ("exact", torch.float64)):
            given = [row.to(dtype) for row in rows]
            merged = merge_tensors(
                given, method, parameters=parameters, base_index=0 if base else None)
            out[f"{method}/{kind}/{name}"] = merged.to(dtype).double().numpy()
np.savez(sys.argv[2], **out)
"""


def rounded(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 and back."""
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def chosen_alike(merger, arrays, kind, experts, exact) -> np.ndarray:
    """Return where pluribus, in float64, gives the reference: all but ties at a cut."""
    from pluribus.engine.reference import merge_arrays

    wide = {k: arrays[f"{kind}/{k}"].astype(np.float64) for k in ("base", *range(experts))}
    base = None if merger_base(merger) == "ignored" else {"w": wide["base"]}
    merged = merge_arrays(merger, base, [{"w": wide[k]} for k in range(experts)])["w"]
    alike = abs(merged - exact) < (1e-9 if kind == "float32" else 1e-6)
    assert alike.mean() > 0.9, f"{merger}: {alike.mean():.1%} agree in float64"
    return alike


def merger_base(merger) -> str:
    from pluribus.core.merger import facts

    return facts(merger).base


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--mergekit", required=True, help="python with mergekit")
    arguments.add_argument("--out", type=Path, help="write the table as JSON")
    options = arguments.parse_args()
    from pluribus.core.registry import MERGERS
    from pluribus.engine.reference import merge_arrays

    rng = np.random.default_rng(0)
    arrays = {"float32/base": rng.normal(0, 0.05, (384, 512)).astype(np.float32)}
    for k in range(3):
        update = rng.normal(0, 0.005, (384, 512)).astype(np.float32)
        arrays[f"float32/{k}"] = arrays["float32/base"] + update
    arrays |= {k.replace("float32", "bfloat16"): rounded(v) for k, v in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        given, found = (str(Path(folder) / name) for name in ("in.npz", "out.npz"))
        np.savez(given, **arrays)
        subprocess.run([options.mergekit, "-c", PEER, given, found, json.dumps(CASES)], check=True)
        theirs = dict(np.load(found))
    rows, worse = [], []
    head = ("pluribus rms", "max", "mergekit rms", "max", "left out")
    print(
        f"{'method':18s}{'type':10s}{head[0]:>14s}{head[1]:>10s}{head[2]:>14s}{head[3]:>10s}{head[4]:>10s}"
    )
    for method, (parameters, experts, base) in CASES.items():
        for kind in ("float32", "bfloat16"):
            merger = MERGERS.build(method, parameters)
            merged = merge_arrays(
                merger,
                {"w": arrays[f"{kind}/base"]} if base else None,
                [{"w": arrays[f"{kind}/{k}"]} for k in range(experts)],
            )["w"]
            merged = rounded(merged) if kind == "bfloat16" else merged
            exact = theirs[f"{method}/{kind}/exact"]
            errors = [abs(x - exact) for x in (merged, theirs[f"{method}/{kind}/own"])]
            beside = chosen_alike(merger, arrays, kind, experts, exact)
            mine, peer = (
                {"rms": float(np.sqrt((e[beside] ** 2).mean())), "max": float(e[beside].max())}
                for e in errors
            )
            left_out = float(1 - beside.mean())
            rows.append(
                {
                    "method": method,
                    "type": kind,
                    "pluribus": mine,
                    "mergekit": peer,
                    "left_out": left_out,
                }
            )
            if mine["rms"] > 1.01 * peer["rms"] + 1e-12:
                worse.append(f"{method} ({kind})")
            print(
                f"{method:18s}{kind:10s}{mine['rms']:14.2e}{mine['max']:10.1e}"
                f"{peer['rms']:14.2e}{peer['max']:10.1e}{left_out:10.2%}"
            )
    if options.out:
        options.out.write_text(json.dumps({"rows": rows}, indent=1))
    if worse:
        print(f"above mergekit's: {', '.join(worse)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""The ways of adding low-rank updates, timed and fitted: what `pluribus.route._adding` chooses by.

    python benchmarks/route_ways.py

Batches, tokens, ranks and widths vary, and how rows are shared out among eight parts; every way is
timed on each (medians, all factors of twelve layers in turn, so that none is found in a cache). The
costs are fitted to the times by least squares of their relative errors, with no negative cost.
Prints JSON: the fitted costs, and how much longer than the best way the chosen one takes with the
costs that are in use and with the fitted ones.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from scipy.optimize import nnls

from pluribus.route import _adding as adding
from pluribus.route._route import Route

PARTS, LAYERS = 8, 12
NAMES = ("fused", "by row", "packed", "in turn", "whole")
TERMS = ("begin", "product", "moved", "read")


def tables(rows: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Return weights (b, 8): as many rows a part, by chance (sorted too), mostly one, two a row."""
    even = torch.nn.functional.one_hot(torch.arange(rows) * PARTS // rows, PARTS).float()
    chance = torch.randint(PARTS, (rows,), generator=rng)
    mostly = torch.where(torch.rand(rows, generator=rng) < 0.7, 0, chance)
    hot = torch.nn.functional.one_hot
    two = hot(chance, PARTS) + 0.5 * hot((chance + 3) % PARTS, PARTS)
    return {
        "even": even,
        "chance": hot(chance, PARTS).float(),
        "sorted": hot(chance.sort().values, PARTS).float(),
        "mostly one": hot(mostly, PARTS).float(),
        "two": two.float(),
    }


def timed(run, steps: int) -> float:
    """Return microseconds of one of the layers."""
    run()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times) / LAYERS * 1e6


def layers(way: str, x, y, first, second, packed) -> None:
    """Add to all layers' outputs in one way."""
    for a, b in zip(first, second, strict=True):
        if way == "fused":
            adding._fused(x, y, a, b, packed.updates(x.shape[1], a.shape[1]))
        else:
            adding.WAYS[way](x, y, a, b, packed)


def measured(steps: int) -> list[dict]:
    rng = torch.Generator().manual_seed(0)
    found = []
    grid = itertools.product(
        (1, 8, 32), (1, 16, 50), (8, 32, 80), ((384, 384), (384, 1536), (1536, 384))
    )
    for rows, places, rank, (inputs, outputs) in grid:
        first = [torch.randn(PARTS, rank, inputs, generator=rng) for _ in range(LAYERS)]
        second = [torch.randn(PARTS, rank, outputs, generator=rng) for _ in range(LAYERS)]
        x = torch.randn(rows, places, inputs, generator=rng)
        y = torch.zeros(rows, places, outputs)
        for kind, table in tables(rows, rng).items():
            packed = Route(table).packed(rows, tuple(range(PARTS)))
            assert packed is not None
            sizes = (
                *(rows, places, inputs, PARTS, rank, outputs),
                *(packed.used, packed.filled, packed.count, packed.straight),
                packed.runs is not None,
            )
            times = {
                way: timed(partial(layers, way, x, y, first, second, packed), steps)
                for way in adding.counts(*sizes)
            }
            print(kind, sizes, times, file=sys.stderr, flush=True)
            found.append({"sizes": sizes, "times": times})
    return found


def fitted(cases: list[dict]) -> dict[str, dict[str, float]]:
    out = {}
    for way in NAMES:
        open_to = [c for c in cases if way in c["times"]]
        rows = np.array([adding.counts(*c["sizes"])[way] for c in open_to], float)
        times = np.array([c["times"][way] for c in open_to])
        found, _ = nnls(rows / times[:, None], np.ones(len(times)))
        out[way] = dict(zip(TERMS, map(float, found), strict=True))
    return out


def lost(cases: list[dict], costs: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how much longer than the best way the chosen ones take, on average and at worst."""
    over = []
    for case in cases:
        counts = adding.counts(*case["sizes"])
        guess = {
            way: sum(c * n for c, n in zip(costs[way].values(), counts[way], strict=True))
            for way in counts
        }
        chosen = min(guess, key=guess.__getitem__)
        over.append(case["times"][chosen] / min(case["times"].values()))
    return {"mean": round(float(np.mean(over)), 3), "worst": round(max(over), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.no_grad():
        cases = measured(given.steps)
    costs = fitted(cases)
    print(
        json.dumps(
            {
                "fitted": costs,
                "over_best": {"fitted": lost(cases, costs), "in use": lost(cases, adding.COSTS)},
                "cases": len(cases),
                "threads": given.threads,
                "processors": os.cpu_count(),
                "torch": version("torch"),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()

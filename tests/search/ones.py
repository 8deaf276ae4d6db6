"""What other processes import, and a search to be killed: `ones.py STORE NAME TRIALS WORKERS`."""

import sys
import time

from pluribus import search

CHOICES = {
    "method": search.oneof(["sum", "mean", "max"]),
    "scale": search.floatv(0.0, 1.0),
    "experts": search.manyof(2, ["a", "b", "c", "d"], sorted=True),
    "extra": search.oneof([{"k": 1.0}, {"k": search.floatv(0.0, 2.0)}]),
}
BITS = {f"bit{i}": search.oneof([0, 1]) for i in range(8)}


def score(point):
    """A function of everything in CHOICES, best at mean, 0.3, b and c, 2."""
    told = {"sum": 0.5, "mean": 1.0, "max": 0.0}[point["method"]]
    told -= abs(point["scale"] - 0.3)
    return told + sum(e in "bc" for e in point["experts"]) + point["extra"]["k"]


def slow(point):
    time.sleep(0.02 + 0.02 * (point["method"] == "max"))
    return score(point)


def ones(point):
    return float(sum(point.values()))


def seeded(point, seed, report):
    report["seen"] = seed
    return {"score": point["scale"], "seed": seed}


def fails_at_max(point):
    if point["method"] == "max":
        raise ValueError("max is not to be had")
    return score(point)


def scale_of(point):
    return point["scale"]


if __name__ == "__main__":
    path, algorithm, trials, workers = sys.argv[1:5]
    search.run(CHOICES, slow, algorithm, int(trials), store=path, seed=3, workers=int(workers))
